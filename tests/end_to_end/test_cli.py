"""The command line at toy size: train, generate, import; bad input gives one sentence and exit code 2."""

import json
import lzma
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import start as start_calm
from reports import Page
from toy import TOY, failure
from transformers import AutoTokenizer, pipeline

from calm.cli import main
from calm.data.prepared import load_prepared
from calm.models.calm import CalmForCausalLM

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_train_writes_a_self_contained_folder(root):
    assert (root / "run/recipe.yaml").is_file()
    assert (root / "run/model/tokenizer.json").is_file()
    history = json.loads((root / "run/history.json").read_text())
    assert any("eval_token_accuracy" in entry for entry in history["autoencoder"])
    assert any("eval_brier_lm" in entry for entry in history["language_model"])
    for stage in history.values():
        logged = [entry for entry in stage if "loss" in entry]
        assert logged[-1]["tokens_per_second"] > 0 and logged[-1]["memory_gib"] > 0.1
        assert 0 < logged[-1]["utilisation"] < 1


def test_generate_with_a_seed_repeats_itself(root, capsys):
    arguments = ["generate", str(root / "run/model"), "Once upon", "There was a dog", "--seed", "1",
                 "--max_new_tokens", "12", "--num_draws", "8"]  # fmt: skip
    main(arguments)
    first = capsys.readouterr().out
    main(arguments)
    assert capsys.readouterr().out == first
    assert first.startswith("Once upon")
    assert "\n\nThere was a dog" in first


def test_stream_writes_the_same_text(root, capsys):
    arguments = ["generate", str(root / "run/model"), "Once upon", "There", "--seed", "1", "-n", "1"]
    main([*arguments, "--max_new_tokens", "12"])
    expected = capsys.readouterr().out
    main([*arguments, "--max_new_tokens", "12", "--stream"])
    assert capsys.readouterr().out.strip() == expected.strip()


def test_flops_of_a_folder_and_of_recipes(root, baseline, capsys):
    main(["flops", str(root / "run/model"), "--draws", "50", "--positions", "16"])
    out = capsys.readouterr().out
    for word in ("with 50 draws", "vocabulary", "K = 4", "300 token ids", "16 positions"):
        assert word in out
    main(["flops", str(baseline)])
    out = capsys.readouterr().out
    assert "K = 1" in out and "draws" not in out
    main(["flops", "laptop", "--vocab_size", "4096"])  # Its head takes a temperature in one draw.
    out = capsys.readouterr().out
    assert "K = 4" in out and "draws" not in out and "T = 1" not in out
    main(["flops", "laptop_energy", "--vocab_size", "4096"])
    out = capsys.readouterr().out
    assert "with 200 draws" in out and "T = 1" in out
    main(["flops", "calm_m", "--vocab_size", "128257", "--published"])
    out = capsys.readouterr().out
    assert "291 M" in out and "30.2 G" in out
    assert "no recipe 'nothing'" in failure(capsys, "flops", "nothing")
    assert "at least 1, got 2048 and 0" in failure(capsys, "flops", "calm_m", "--draws", "0")
    assert "no config.json" in failure(capsys, "flops", str(root))


def test_prepare_then_train_from_the_prepared_folder(root, tmp_path, capsys):
    main(["prepare", str(root / "text.jsonl"), "--output", str(tmp_path / "data"), "--vocab_size", "300"])
    assert "300 token ids" in capsys.readouterr().out
    main(["train", "--recipe", str(root / "toy.yaml"), "--data.sources", str(tmp_path / "data"),
          "--output", str(tmp_path / "run"), "--autoencoder.path", str(root / "run/autoencoder"),
          "--language_model.training.steps", "2"])  # fmt: skip
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_generate_from_python(root):
    from calm import CalmForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(root / "run/model")
    model = CalmForCausalLM.from_pretrained(root / "run/model")
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=10, temperature=0.5, num_draws=8, seed=0)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).startswith("Once upon a time")


def test_text_generation_pipeline(root):
    write = pipeline("text-generation", model=str(root / "run/model"), device="cpu")
    (out,) = write("Once upon a time", max_new_tokens=8, temperature=0.5, num_draws=8)
    assert out["generated_text"].startswith("Once upon a time")
    assert len(out["generated_text"]) > len("Once upon a time")
    batch = write(["Once", "There was a little dog"], max_new_tokens=8, batch_size=2, num_return_sequences=2)
    assert [len(row) for row in batch] == [2, 2]


def test_import_converts_each_kind_of_head(tmp_path, capsys):
    case = FIXTURES / "energy_k4"
    main(["import", "--autoencoder", str(case / "autoencoder"), "--model", str(case / "calm"),
          "--out", str(tmp_path / "out")])  # fmt: skip
    assert "energy head, K = 4" in capsys.readouterr().out
    for head in ("flow", "diffusion"):
        folder, out = FIXTURES / f"{head}_k4", tmp_path / head
        main(["import", "--autoencoder", str(folder / "autoencoder"), "--model", str(folder / "calm"),
              "--out", str(out)])  # fmt: skip
        assert f"{head} head, K = 4" in capsys.readouterr().out
        assert CalmForCausalLM.from_pretrained(out).config.head.num_steps in (10, 100)
    assert "is not empty" in failure(
        capsys,
        "import",
        "--autoencoder",
        case / "autoencoder",
        "--model",
        case / "calm",
        "--out",
        tmp_path / "out",
    )


def test_import_refuses_mismatched_and_damaged_parts(tmp_path, capsys):
    k4, k2 = FIXTURES / "energy_k4", FIXTURES / "energy_k2_gqa"
    out = tmp_path / "out"
    message = failure(
        capsys, "import", "--autoencoder", k2 / "autoencoder", "--model", k4 / "calm", "--out", out
    )
    assert "the autoencoder has 2 tokens per chunk but the language model has 4" in message
    shutil.copytree(k4, tmp_path / "torn")
    weights = tmp_path / "torn/calm/pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:5000])
    message = failure(
        capsys, "import", "--autoencoder", k4 / "autoencoder", "--model", tmp_path / "torn/calm", "--out", out
    )
    assert "truncated or damaged" in message
    config = json.loads((k4 / "calm/config.json").read_text())
    config.pop("noise_size")
    (tmp_path / "torn/calm/config.json").write_text(json.dumps(config))
    message = failure(
        capsys, "import", "--autoencoder", k4 / "autoencoder", "--model", tmp_path / "torn/calm", "--out", out
    )
    assert "lack the field 'noise_size'" in message
    assert not out.exists()


def test_import_refuses_a_larger_tokenizer(root, tmp_path, capsys):
    case = FIXTURES / "energy_k4"
    message = failure(
        capsys, "import", "--autoencoder", case / "autoencoder", "--model", case / "calm",
        "--tokenizer", root / "run/model", "--out", tmp_path / "out",
    )  # fmt: skip
    assert "has 300 tokens, more than the model's 256" in message


def test_doctor_reports_the_machine(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    for word in ("torch", "device", "dtype", "attention", "sdpa"):
        assert word in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "there is no file or folder"),
        ("empty.txt", b"", "there is no text in"),
        ("latin.txt", "first\nd\xe9j\xe0\n".encode("latin-1"), "is not UTF-8 (line 2"),
        (
            "lines.jsonl",
            b'{"words": "good"}\n{"words": "bad"}\n',
            "has no field 'text'; its fields are words",
        ),
        ("odd.jsonl", b'{"text": "good"}\n{"text": ["bad"]}\n', "line 2"),
        ("broken.jsonl", b'{"text": "good"}\n{"text": \n', "line 2, is not JSON"),
        ("torn.jsonl.xz", lzma.compress(b'{"text": "good"}\n' * 9000)[:-40], "damaged"),
        ("one.txt", b"a single document", "holds a single document"),
        ("text.pdf", b"%PDF-1.7\n\0", "it is not UTF-8 plain text"),
    ],
)
def test_bad_text_is_refused(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in failure(capsys, "prepare", tmp_path / name, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_saves_a_recipe_without_extends(root, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"extends: {root / 'toy.yaml'}\nseed: 5\n")
    (tmp_path / "whole.yaml").write_text(f"{TOY}\nseed: 5\n")
    for name in ("mine", "whole"):
        main(["train", "--recipe", str(tmp_path / f"{name}.yaml"), "--data.sources", str(root / "run/data"),
              "--autoencoder.training.steps", "1", "--language_model.training.steps", "1",
              "--output", str(tmp_path / name)])  # fmt: skip
    saved = (tmp_path / "mine/recipe.yaml").read_bytes()
    assert saved == (tmp_path / "whole/recipe.yaml").read_bytes() and b"extends" not in saved


def test_bad_recipes_are_refused(root, tmp_path, capsys):
    def train(*options: object) -> str:
        return failure(
            capsys, "train", "--data.sources", root / "text.jsonl", "--output", tmp_path / "out", *options
        )

    assert "did you mean --data.vocab_size?" in train("--data.vocab_sise", "3")
    (tmp_path / "bad.yaml").write_text("language_model:\n  hiden_size: 3\n")
    assert "did you mean language_model.hidden_size?" in train("--recipe", tmp_path / "bad.yaml")
    assert "there is no recipe 'demoo'" in train("--recipe", "demoo")
    assert "data.context" in train("--data.context", "many")
    assert "multiple of the chunk size 4" in train("--data.context", "30")
    assert "num_encoder_layers must be even" in train(
        "--recipe", root / "toy.yaml", "--autoencoder.num_encoder_layers", 3
    )
    assert not (tmp_path / "out/model").exists()


def test_an_unknown_head_is_refused_before_training(root, tmp_path, capsys):
    start = time.monotonic()
    message = failure(
        capsys, "train", "--recipe", root / "toy.yaml", "--data.sources", root / "text.jsonl",
        "--output", tmp_path / "out", "--language_model.head", '{"head_type": "magic"}',
    )  # fmt: skip
    assert "unknown head_type 'magic'" in message
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - start < 5


def test_nothing_is_overwritten_by_default(root, capsys):
    before = (root / "run/model/model.safetensors").read_bytes()
    arguments = [
        "train",
        "--recipe",
        root / "toy.yaml",
        "--data.sources",
        root / "text.jsonl",
        "--output",
        root / "run",
    ]
    assert "is not empty" in failure(capsys, *arguments)
    assert "is not empty" in failure(capsys, "prepare", root / "text.jsonl", "--output", root / "run")
    assert (root / "run/model/model.safetensors").read_bytes() == before


def _modified(folder):
    """A copy of a model folder whose configuration no longer has its checksum."""
    other = folder.with_name("changed")
    shutil.copytree(folder, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    return other


def test_damaged_model_folders_are_refused(root, tmp_path, capsys):
    assert "there is no such folder" in failure(capsys, "generate", tmp_path / "none", "Once")
    (tmp_path / "bare").mkdir()
    assert "no config.json" in failure(capsys, "generate", tmp_path / "bare", "Once")
    torn = tmp_path / "torn"
    shutil.copytree(root / "run/model", torn)
    weights = torn / "model.safetensors"
    assert "is damaged or was modified" in failure(capsys, "generate", _modified(torn), "Once")
    (torn / "checksums.json").unlink()
    intact = weights.read_bytes()
    weights.write_bytes(intact[: len(intact) // 2])
    assert "is truncated or damaged" in failure(capsys, "generate", torn, "Once")
    weights.write_bytes(intact)
    config = json.loads((torn / "config.json").read_text())
    (torn / "config.json").write_text("{")
    assert "config.json' is damaged" in failure(capsys, "generate", torn, "Once")
    config["autoencoder_config"]["vocab_size"] = 100
    (torn / "config.json").write_text(json.dumps(config))
    assert "do not fit their configuration" in failure(capsys, "generate", torn, "Once")


def test_a_tokenizer_larger_than_the_model_is_refused(root, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(root / "run/model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    error = failure(capsys, "generate", folder, "Once")
    assert "tokenizer.json has" in error and "if the change was intended, remove '" in error
    (folder / "checksums.json").unlink()
    assert "has 301 tokens, more than the model's 300" in failure(capsys, "generate", folder, "Once")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "1.7"], "temperature must lie between 0 and 1"),
        (["--temperature", "0.25", "--max_draws", "2"], "at least 4 draws"),
        (["--sampler", "pool", "--temperature", "0.25", "--num_draws", "2"], "at least 4 draws"),
        (["--top_p", "0.5", "--sampler", "exact"], "use them with sampler='pool'"),
        (["--max_new_tokens", "0"], "max_new_tokens"),
        (["--tempurature", "1"], "unrecognized"),
    ],
)
def test_bad_generation_options_are_refused(root, capsys, options, message):
    assert message in failure(capsys, "generate", root / "run/model", "Once", *options)


def test_help_is_quick_and_does_not_import_torch():
    code = "import sys; sys.argv = ['calm', '--help']\nfrom calm_command import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # A generous limit; on a loaded machine, importing torch alone would take longer.
    assert time.monotonic() - start < 5
    assert out.endswith("False False\n")


def test_a_mistake_prints_no_traceback(tmp_path):
    result = start_calm("generate", tmp_path / "none", "Once").wait()
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("calm: error:")


def test_two_runs_of_a_recipe_have_equal_weights(root, tmp_path):
    main(["train", "--recipe", str(root / "toy.yaml"), "--data.sources", str(root / "text.jsonl"),
          "--output", str(tmp_path / "again")])  # fmt: skip
    weights = [
        (folder / "model/model.safetensors").read_bytes() for folder in (root / "run", tmp_path / "again")
    ]
    assert weights[0] == weights[1]
    assert torch.get_num_threads() == 1


def test_demo_trains_on_stories_and_writes_a_report(root, tmp_path, capsys):
    demo = ["demo", "--recipe", str(root / "toy.yaml"), "--output", str(tmp_path / "demo")]
    assert "stories must be at least 2" in failure(capsys, *demo, "--stories", "1")
    main([*demo, "--stories", "30"])
    out = capsys.readouterr().out
    assert "writing 30 stories" in out and "5-gram" in out
    texts = (tmp_path / "demo-stories.jsonl").read_text().splitlines()
    data = load_prepared(tmp_path / "demo/data")
    assert len(texts) == len(data.train) + len(data.validation) == 30 and len(data.validation) == 3
    page = Page((tmp_path / "demo/report.html").read_text(encoding="utf-8"))
    assert page.texts("p", **{"class": "subtitle"}) == ["CALM, K = 4, energy head"]
    assert {"Parameters", "Training FLOPs", "Training time"} <= set(page.texts("dt"))
    assert len(page.texts("picture")) == 4 and page.texts("time") and len(page.texts("article")) == 3
    assert "is not empty" in failure(capsys, *demo)
    (tmp_path / "other-stories.jsonl").write_text("mine")
    error = failure(capsys, *demo[:-1], str(tmp_path / "other"), "--stories", "30", "--overwrite")
    assert "other-stories.jsonl', which already exists with other contents" in error
    assert (tmp_path / "other-stories.jsonl").read_text() == "mine"
