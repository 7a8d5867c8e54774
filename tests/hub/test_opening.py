"""Folders with custom code: it never runs, the user is not asked to allow it, and every command says so."""

import ast
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import failure, toy_recipe

import calm
from calm.data.stories import write_stories
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError
from calm.hub.opening import base_of_adapters, read_settings
from calm.models.loading import load_autoencoder, load_language_model_and_tokenizer, load_model
from calm.training import stages
from calm.training.recipe_files import write_recipe

RELEASED = Path(__file__).parents[1] / "fixtures/energy_k4"
SOURCE = Path(calm.__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_stories(folder / "text.jsonl", 0, 30)
    recipe = toy_recipe(folder / "text.jsonl")
    write_recipe(recipe, folder / "toy.yaml")
    stages.train(recipe, folder / "run")
    lines = [json.dumps({"prompt": f"p{n}", "completion": "c"}) + "\n" for n in range(9)]
    (folder / "examples.jsonl").write_text("".join(lines))
    return folder


def update_json(file: Path, **changes):
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | changes))


@pytest.fixture
def hostile(run, tmp_path, monkeypatch):
    """A model whose tokenizer and generation need custom code, which would leave a file if it ran."""
    folder = tmp_path / "hostile"
    shutil.copytree(run / "run/model", folder)
    (folder / "checksums.json").unlink()
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code + "class Evil: pass\ndef generate(*a, **k): pass\n")
    auto = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    update_json(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Evil")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    yield folder
    assert not (tmp_path / "ran").exists()
    assert sys.stdin.read() == "y\n" * 20  # The user was not asked.


def set_unknown_type(folder: Path):
    """Make the model one of a type that only its custom code knows."""
    update_json(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    )


COMMANDS = {
    "generate": ["generate", "{model}", "Once"],
    "evaluate": ["evaluate", "{model}", "{text}"],
    "serve": ["serve", "{model}", "--port", "0"],
    "finetune": ["finetune", "--recipe", "full", "--model", "{model}", "--examples.sources", "{examples}"],
    "compare": ["compare", "{model}", "--data", "{data}"],
    "prepare": ["prepare", "{text}", "--tokenizer", "{model}"],
    "train with its tokenizer": ["train", "--recipe", "{toy}", "--data.tokenizer", "{model}"],
    "import with its tokenizer": [
        "import", "--autoencoder", "{released}/autoencoder", "--model", "{released}/calm", "--tokenizer",
        "{model}",
    ],
    "share": ["share", "{run}", "--export", "{out}"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("change", [None, set_unknown_type])
def test_no_command_runs_custom_code(change, arguments, hostile, run, tmp_path, capsys):
    if change:
        change(hostile)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model").symlink_to(hostile)
    for name in ("recipe.yaml", "history.json"):
        shutil.copy(run / "run" / name, tmp_path / "run")
    paths = {
        "model": hostile, "text": run / "text.jsonl", "examples": run / "examples.jsonl",
        "data": run / "run/data", "toy": run / "toy.yaml", "run": tmp_path / "run", "out": tmp_path / "out",
        "released": RELEASED,
    }  # fmt: skip
    filled = [part.format(**paths) for part in arguments]
    if arguments[0] in ("finetune", "compare", "prepare", "train"):
        filled += ["--output", str(tmp_path / "out")]
    if arguments[0] == "import":
        filled += ["--out", str(tmp_path / "out")]
    message = failure(capsys, *filled)
    assert "needs custom code" in message and "trust_remote_code" not in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["flops", "train"])
def test_reading_a_configuration_runs_no_custom_code(name, hostile, run, tmp_path, capsys):
    set_unknown_type(hostile)
    arguments = {
        "flops": ["flops", hostile],
        "train": [
            "train",
            "--recipe",
            run / "toy.yaml",
            "--autoencoder.path",
            hostile,
            "--output",
            tmp_path / "out",
        ],
    }[name]
    assert "needs custom code (auto_map), which calm never runs" in failure(capsys, *arguments)


def test_message_says_which_custom_code_is_needed(hostile):
    with pytest.raises(InputError, match=r"needs custom code \(custom_generate/generate\.py\)"):
        load_model(str(hostile))
    with pytest.raises(InputError, match=r"needs custom code \(auto_map\)"):
        load_tokenizer(str(hostile))
    shutil.rmtree(hostile / "custom_generate")
    update_json(hostile / "config.json", attn_implementation="evil/kernels")
    with pytest.raises(InputError, match=r"needs custom code .the attention 'evil/kernels'"):
        load_model(str(hostile))


def test_custom_code_that_is_not_needed_is_ignored(hostile):
    """Many published folders keep code for versions of transformers that did not have the model."""
    shutil.rmtree(hostile / "custom_generate")
    update_json(hostile / "config.json", auto_map={"AutoConfig": "evil.Evil"})
    assert load_model(str(hostile)).config.chunk_size == 4


@pytest.mark.parametrize("field", ["megatron_config", "auto_mapping"])
def test_adapter_settings_import_nothing(field, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": "x", "megatron_core": "evil",
        field: {"parent_library": "evil", "base_model_class": "Evil"},
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    if field == "auto_mapping":  # It names the model's class, which is not needed.
        assert base_of_adapters(tmp_path) == "x"
    else:
        with pytest.raises(InputError, match=r"needs custom code .megatron_config in adapter_config"):
            base_of_adapters(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_adapters_that_do_not_fit_the_model_are_refused(run, tmp_path):
    model, tokenizer = load_language_model_and_tokenizer(str(run / "run/model"))
    layers = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, layers)
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    update_json(tmp_path / "adapter_config.json", base_model_name_or_path=str(run / "run/model"))
    load_language_model_and_tokenizer(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"other.{name}": weight for name, weight in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"do not fit the model: 8 of their tensors are missing, the"):
        load_language_model_and_tokenizer(str(tmp_path))
    update_json(tmp_path / "adapter_config.json", target_modules=["none"])
    with pytest.raises(InputError, match=r"cannot load the adapters in '.*' \(.*none"):
        load_language_model_and_tokenizer(str(tmp_path))


def test_model_saved_over_another_is_not_checked_against_old_checksums(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run / "run/model", folder)
    model = load_model(str(folder))
    with torch.no_grad():
        model.head.out.weight.add_(1)
    model.save_pretrained(folder)
    assert (load_model(str(folder)).head.out.weight == model.head.out.weight).all()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["torch", "pickle", "legacy"])
def test_pickles_that_could_run_code_are_refused(form, run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run / "run/autoencoder", folder)
    for name in ("checksums.json", "model.safetensors"):
        (folder / name).unlink()
    weights = load_file(run / "run/autoencoder/model.safetensors") | {"x": Evil(tmp_path / "ran")}
    if form == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    else:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(InputError, match=r"is a pickle that could run code, so it was not loaded") as error:
        load_autoencoder(folder)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_pickles_of_only_weights_are_loaded(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run / "run/model", folder)
    (folder / "checksums.json").unlink()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    model, _ = load_language_model_and_tokenizer(str(folder))
    assert all((model.state_dict()[name].cpu() == weight).all() for name, weight in weights.items())


DAMAGED = ["", "[]", "1", "{", "\0", "[" * 100_000, '{"a": 1', b"\xff\xfe"]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_settings_are_refused(content, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)
    with pytest.raises(InputError, match=r"config\.json' is damaged .*; restore it from a copy"):
        read_settings(file)


def test_too_long_settings_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "' + "x" * 10_000_000 + '"}')
    with pytest.raises(InputError, match=r"too large for a settings file \(10,000,009 bytes\)"):
        read_settings(tmp_path / "config.json")


LOADERS = ("from_pretrained", "load_dataset", "import_module")
ALLOWED = {"hub/opening.py", "data/rows.py"}


def test_only_two_modules_call_loaders_of_third_party_files():
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE).as_posix()
        calls = {
            node.attr
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and node.attr in LOADERS
        }
        assert name in ALLOWED or not calls, f"{name} calls {calls}; use calm.hub.opening"
