"""A command that is refused leaves nothing behind, and removes nothing."""

import json
import shutil
from pathlib import Path

import pytest
from toy import failure, toy_recipe, toy_source

from calm.cli import main
from calm.data import pieces, sources
from calm.data.prepared import load_prepared
from calm.data.stories import write_stories
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError
from calm.models.shipped import folder_of
from calm.training import opening, stages
from calm.training.recipe_files import with_settings, write_recipe
from calm.training.runs import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with text, a recipe, a run of another chunk size, and examples."""
    folder = tmp_path_factory.mktemp("runs")
    write_stories(folder / "text.jsonl", 0, 30)
    (folder / "examples.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{n}", "completion": "c"}) + "\n" for n in range(9))
    )
    recipe = toy_recipe(folder / "text.jsonl")
    write_recipe(recipe, folder / "toy.yaml")
    stages.train(with_settings(recipe, {"chunk_size": 2}), folder / "of_two")
    return folder


def contents_of(folder: Path):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


REFUSED = {
    "a mistyped source": ("--data.sources", "nofile.txt", "there is no file or folder 'nofile.txt'"),
    "a hub dataset": ("--data.sources", "nobody/nothing", "nor a dataset on the hub"),
    "one of several sources": ("--data.sources", '["{text}", "no.jsonl"]', "no file or folder 'no.jsonl'"),
    "an unknown format": (
        "--data.sources",
        "{folder}/of_two/autoencoder/model.safetensors",
        "not UTF-8 plain text",
    ),
    "a folder without text": ("--data.sources", "{empty}", "holds no .txt"),
    "validation sources": ("--data.validation_sources", "no.txt", "no file or folder 'no.txt'"),
    "a tokenizer": ("--data.tokenizer", "no/such", "cannot load a tokenizer from 'no/such'"),
    "a tokenizer file": ("--data.tokenizer", "no.json", "there is no tokenizer file 'no.json'"),
    "the vocabulary": ("--data.vocab_size", "10", "vocab_size must be at least 259"),
    "the fraction": ("--data.validation_fraction", "1.5", "must be above 0 and below 1, got 1.5"),
    "no field": (
        "--data.text_field",
        "a,,b",
        "text_field must name one field, or several such as title,text",
    ),
    "a field": ("--data.text_field", "body", "has no field 'body'; its fields are text"),
    "an autoencoder": ("--autoencoder.path", "nowhere", "there is no model in 'nowhere'"),
    "an autoencoder of other chunks": (
        "--autoencoder.path",
        "{folder}/of_two/autoencoder",
        "set chunk_size to 2",
    ),
    "the seed": ("--seed", "-1", "the seed must lie between 0 and"),
    "workers": (
        "--language_model.training.num_workers",
        "-1",
        "at most 4,096, got -1",
    ),
    "the attention": ("--language_model.attention", "none", "the recipe does not define a valid model"),
    "the optimizer": ("--autoencoder.training.optimizer.name", "none", "there is no optimizer 'none'"),
}


@pytest.mark.parametrize(("option", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_training_leaves_nothing_behind(option, value, message, runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    value = value.replace("{folder}", str(runs)).replace("{empty}", str(tmp_path / "empty"))
    value = value.replace("{text}", str(runs / "text.jsonl"))
    arguments = ["train", "--recipe", runs / "toy.yaml", option, value]
    before = contents_of(tmp_path)
    assert message in failure(capsys, *arguments, "--output", tmp_path / "new/deep/run")
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize("side", ["init_from", "teacher.model"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "damaged", "a shard", "pickle"])
def test_unreadable_weights_are_found_before_text_is_prepared(side, fault, tmp_path, capsys, monkeypatch):
    toy_source(tmp_path)
    weights = tmp_path / "source/model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if fault in ("truncated", "damaged"):
        weights.write_bytes(content[: len(content) // 2] if fault == "truncated" else b"\xff" * 99)
    elif fault == "a shard":
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
        (tmp_path / "source/model.safetensors.index.json").write_text(json.dumps(index))
    elif fault == "pickle":
        (tmp_path / "source/pytorch_model.bin").write_bytes(b"PK\x03\x04")
    settings = {f"language_model.{side}": str(tmp_path / "source")}
    settings |= {"data.tokenizer": None} if side == "init_from" else {"data.tokenizer": tmp_path / "source"}
    autoregressive = {"model": "autoregressive", "chunk_size": 1, "data.vocab_size": 300}
    recipe = with_settings(
        toy_recipe(tmp_path / "text.jsonl"),
        {name: value if value is None else str(value) for name, value in settings.items()} | autoregressive,
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")
    monkeypatch.setattr("calm.training.opening.prepare", lambda *_, **__: pytest.fail("text was prepared"))
    error = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    words = {"missing": "there are no weights in", "a shard": "which is missing; restore it from a copy"}
    assert words.get(fault, "it is truncated or damaged") in error and "source" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a mistyped source", "a hub dataset", "a field"])
def test_refused_training_removes_nothing(name, runs, tmp_path, capsys):
    option, value, _ = REFUSED[name]
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("mine")
    shutil.copy(runs / "of_two/recipe.yaml", tmp_path / "run")
    before = contents_of(tmp_path)
    arguments = ["train", "--recipe", runs / "toy.yaml", option, value, "--overwrite"]
    failure(capsys, *arguments, "--output", tmp_path / "run")
    assert contents_of(tmp_path) == before


def test_settings_that_the_optimizer_rejects_are_refused(runs, tmp_path, capsys):
    changes = {"name": "lion", "extra": '{"betas": [2, 2]}'}
    more = [f"--language_model.training.optimizer.{name}={value}" for name, value in changes.items()]
    arguments = ["train", "--recipe", runs / "toy.yaml", "--output", tmp_path / "run", *more]
    assert "the optimizer 'lion' does not accept its settings" in failure(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_corrected_command_works_in_the_same_folder(runs, tmp_path, capsys):
    arguments = ["train", "--recipe", str(runs / "toy.yaml"), "--output", str(tmp_path / "run")]
    failure(capsys, *arguments, "--data.sources", "nobody/nothing")
    main(arguments)
    assert (tmp_path / "run/model/model.safetensors").is_file()
    stderr = capsys.readouterr().err
    assert stderr.count("calm: text: 24 documents and ") == 1
    main([*arguments, "--overwrite"])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "autoencoder", "checkpoints", "data", "history.json", "inputs.json", "model", "recipe.yaml",
        "report.html",
    ]  # fmt: skip


def test_document_counts_of_prepared_text_are_logged(runs, tmp_path, caplog):
    recipe = with_settings(toy_recipe(runs / "of_two/data"), {"model": "autoregressive", "chunk_size": 1})
    with caplog.at_level("INFO", "calm"):
        stages.train(recipe, tmp_path / "run")
    counts = load_prepared(runs / "of_two/data").counts()
    assert f"text: {counts}" in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("overwrite", [False, True])
def test_partly_prepared_text_is_kept_for_the_next_attempt(overwrite, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_GROUP_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(pieces, "_DOCUMENTS_PER_PIECE", 5)
    text, run = tmp_path / "text", tmp_path / "run"
    text.mkdir()
    for number in range(4):
        write_stories(text / f"{number}.jsonl", number, 10)
    good = (text / "3.jsonl").read_text()
    (text / "3.jsonl").write_text(good + "{\n")
    if overwrite:
        run.mkdir()
        (run / "history.json").write_text("old")
        shutil.copy(runs / "of_two/recipe.yaml", run)
    recipe = toy_recipe(text)
    with pytest.raises(InputError, match=r"3\.jsonl', line 11.*kept in '.*\.data\.work'"):
        stages.train(recipe, run, overwrite=overwrite)
    old = ["history.json", "recipe.yaml"] if overwrite else []
    assert sorted(path.name for path in run.iterdir()) == [".data.work", *old]
    (text / "3.jsonl").write_text(good)
    stages.train(recipe, run, overwrite=overwrite)
    assert sorted(path.name for path in run.iterdir()) == [
        "autoencoder", "checkpoints", "data", "history.json", "inputs.json", "model", "recipe.yaml",
    ]  # fmt: skip


def test_commands_do_not_overwrite_their_own_inputs(runs, tmp_path, capsys):
    run = tmp_path / "run"
    stages.train(toy_recipe(runs / "text.jsonl"), run)
    (run / "mine.txt").write_text("one\n\ntwo\n")
    (tmp_path / "link").symlink_to(run / "mine.txt")
    before = contents_of(tmp_path)
    train = ["train", "--recipe", runs / "toy.yaml", "--overwrite", "--output", run]
    for more in (
        ("--data.sources", run / "mine.txt"),
        ("--data.sources", run),
        ("--data.sources", run / "data"),
        ("--data.validation_sources", tmp_path / "link"),
        ("--data.tokenizer", run / "model"),
        ("--autoencoder.path", run / "autoencoder"),
    ):
        assert "lies in the output folder" in failure(capsys, *train, *more), more
    finetune = ["finetune", "--recipe", "full", "--examples.sources", runs / "examples.jsonl", "--overwrite"]
    assert "lies in the output folder" in failure(
        capsys, *finetune, "--model", run / "model", "--output", run
    )
    assert "lies in the output folder" in failure(
        capsys, "prepare", run / "mine.txt", "--overwrite", "--output", run
    )
    assert contents_of(tmp_path) == before


OTHER_COMMANDS = {
    "demo": ["demo", "--stories", "10", "--recipe", "{bad}"],
    "compare": ["compare", "--recipe", "{missing}"],
    "a comparison without a budget": ["compare", "--recipe", "{toy}", "--budget", "0"],
    "ablate": ["ablate", "alpha", "--recipe", "{missing}", "--seeds", "[1]"],
    "an ablation with a bad seed": ["ablate", "alpha", "--recipe", "{toy}", "--seeds", "[1,-1]"],
    "finetune": ["finetune", "--recipe", "full", "--model", "{model}", "--examples.sources", "no.jsonl"],
    "held-out examples": [
        "finetune", "--recipe", "full", "--model", "{model}", "--examples.sources", "{examples}",
        "--examples.validation_sources", "no.jsonl",
    ],
    "adapters": [
        "finetune", "--recipe", "lora", "--model", "{model}", "--examples.sources", "{examples}",
        "--lora.dropout", "2",
    ],
    "prepare": ["prepare", "no.txt"],
    "prepare with held-out text": ["prepare", "{text}", "--validation", "no.txt"],
    "prepare with a broken file": ["prepare", "{broken}"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", OTHER_COMMANDS.values(), ids=OTHER_COMMANDS)
def test_other_refused_commands_leave_nothing_behind(arguments, runs, tmp_path, capsys):
    recipe = toy_recipe(runs / "text.jsonl")
    files = {
        "toy": runs / "toy.yaml", "model": runs / "of_two/model", "text": runs / "text.jsonl",
        "examples": runs / "examples.jsonl", "bad": tmp_path / "bad.yaml",
        "missing": tmp_path / "missing.yaml", "broken": tmp_path / "broken.jsonl",
    }  # fmt: skip
    write_recipe(with_settings(recipe, {"data.vocab_size": 10}), files["bad"])
    write_recipe(with_settings(recipe, {"data.sources": "no.jsonl"}), files["missing"])
    files["broken"].write_text('{"text": "good"}\n{\n')
    before = contents_of(tmp_path)
    failure(capsys, *(part.format(**files) if "{" in part else part for part in arguments),
            "--output", tmp_path / "new/out")  # fmt: skip
    assert contents_of(tmp_path) == before


def test_tokenizer_of_a_shipped_model_is_found_by_its_name(tmp_path, capsys):
    write_stories(tmp_path / "text.jsonl", 0, 12)
    expected = load_tokenizer(folder_of("stories")).get_vocab()
    text, data = str(tmp_path / "text.jsonl"), str(tmp_path / "data")
    main(["prepare", text, "--tokenizer", "stories", "--output", data])
    assert load_prepared(tmp_path / "data").tokenizer.get_vocab() == expected
    recipe = with_settings(toy_recipe(tmp_path / "text.jsonl"), {"data.tokenizer": "stories"})
    with opening.open_run(Run(recipe, tmp_path / "run")) as data:
        assert data.tokenizer.get_vocab() == expected
    write_recipe(recipe, tmp_path / "named.yaml")
    capsys.readouterr()
    main(["flops", str(tmp_path / "named.yaml")])
    assert f"{len(expected):,} token ids" in capsys.readouterr().out
