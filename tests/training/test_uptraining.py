"""Training a CALM that starts from a token-level Transformer."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf_files import gguf_is_not_read, write_gguf
from processes import launch
from safetensors.torch import load_file
from tiny import tiny_model
from toy import failure, killed_and_resumed, toy_recipe, toy_source
from transformers import GPT2Config, LlamaForCausalLM

from calm.data.prepared import load_prepared
from calm.data.tokenizer import load_tokenizer
from calm.flops import training_flops
from calm.models.configuration import CalmAutoencoderConfig
from calm.models.loading import load_model_and_tokenizer
from calm.training import continuing, stages
from calm.training.opening import prepare_text
from calm.training.optimizers import build_optimizer
from calm.training.overview import forecasts_of
from calm.training.recipe import OptimizerSettings
from calm.training.recipe_files import with_settings, write_recipe
from calm.training.runs import Run

INIT = "language_model.init_from"
CUT = {"language_model.uptraining.first_layers": 1, "language_model.uptraining.last_layers": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A text, and a Transformer of four layers with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    toy_source(folder)
    return folder


def recipe_for(base: Path, **settings):
    return with_settings(
        toy_recipe(base / "text.jsonl", "adamw"), {INIT: str(base / "source"), **CUT, **settings}
    )


def test_uptrained_model_generates_and_a_killed_run_resumes(base, tmp_path, monkeypatch):
    recipe = recipe_for(base)
    uninterrupted = stages.train(recipe, tmp_path / "uninterrupted")
    resumed = killed_and_resumed(recipe, tmp_path / "run", monkeypatch)
    weights = [load_file(folder / "model.safetensors") for folder in (uninterrupted, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    codes = load_file(tmp_path / "uninterrupted/autoencoder/model.safetensors")
    assert all(torch.equal(weight, weights[0][f"autoencoder.{name}"]) for name, weight in codes.items())
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["backbone_config"]["num_hidden_layers"] == 2 and config["input_projection"] == "last"
    model, tokenizer = load_model_and_tokenizer(str(uninterrupted))
    assert model.config.head.last_layers == 2 and len(tokenizer) == 300
    text = model.generate(torch.tensor([tokenizer("Once upon a time").input_ids]), max_new_tokens=8)
    assert text.shape[1] > 4


def test_training_starts_from_the_weights_of_the_source(base, tmp_path):
    """With a learning rate of zero, they are also those that training ends with."""
    zero_rate = {"language_model.training.optimizer.learning_rate": 0.0}
    folder = stages.train(recipe_for(base, **zero_rate), tmp_path / "zero_rate")
    after, before = (load_file(path / "model.safetensors") for path in (folder, base / "source"))
    pairs = {
        "backbone.embed_tokens.weight": "model.embed_tokens.weight",
        "head.norm.weight": "model.norm.weight",
        "backbone.layers.1.mlp.up_proj.weight": "model.layers.1.mlp.up_proj.weight",
        "head.first.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
        "head.last.layers.1.self_attn.o_proj.weight": "model.layers.3.self_attn.o_proj.weight",
    }
    assert all(torch.equal(after[new], before[old]) for new, old in pairs.items())
    assert not after["projection.mix.weight"].any() and not after["head.inject.weight"].any()


@pytest.mark.parametrize("sink", [True, False])
def test_recipe_decides_whether_there_are_sinks(sink, base):
    recipe = continuing.with_inherited_parts(recipe_for(base, **{"language_model.uptraining.sink": sink}))
    data = SimpleNamespace(tokenizer=load_tokenizer(str(base / "source")))
    model = continuing.model_to_continue(recipe, data)
    assert continuing.config_to_continue(recipe).head.sink == model.config.head.sink == sink
    assert any("sink" in name for name in model.state_dict()) == sink


def test_model_is_made_on_the_cpu(base, tmp_path, monkeypatch):
    """So that a GPU has to hold only the CALM, and not the source beside it."""
    recipe = continuing.with_inherited_parts(recipe_for(base))
    data = SimpleNamespace(tokenizer=load_tokenizer(str(base / "source")))
    monkeypatch.setattr("calm.models.loading.best_device", lambda: torch.device("meta"))
    model = continuing.model_to_continue(recipe, data)
    assert model.device.type == "cpu" and model.dtype == torch.float32


@pytest.mark.parametrize(
    "settings", [{}, {"model": "autoregressive", "chunk_size": 1}], ids=["uptrained", "continued"]
)
def test_the_overview_loads_no_weights(settings, base, tmp_path, monkeypatch):
    recipe = continuing.with_inherited_parts(recipe_for(base, **settings))
    data = load_prepared(prepare_text(recipe, tmp_path))
    model = continuing.model_to_continue(recipe, data)
    monkeypatch.delattr("calm.models.loading.open_network")
    (forecast,) = forecasts_of(Run(recipe, tmp_path), data)
    assert forecast.parameters == sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert forecast.flops == training_flops(model.config, 32) * 8 * 64 and forecast.seconds > 0


@pytest.mark.skipif(gguf_is_not_read(), reason="needs transformers 5.23")
def test_gguf_file_gives_the_same_weights_as_a_folder(base, tmp_path):
    source = LlamaForCausalLM.from_pretrained(base / "source")
    file = write_gguf(tmp_path / "model.gguf", source, load_tokenizer(str(base / "source")))
    short = {"language_model.training.steps": 2}
    folders = [
        stages.train(recipe_for(base, **{INIT: str(source_path)}, **short), tmp_path / name)
        for name, source_path in (("folder", base / "source"), ("file", file))
    ]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert "quantization" not in (folders[1] / "config.json").read_text()
    assert load_model_and_tokenizer(str(folders[1]))[1]("Once").input_ids[0] == source.config.bos_token_id
    recipe = with_settings(
        toy_recipe(base / "text.jsonl", "adamw"),
        {INIT: str(file), "model": "autoregressive", "chunk_size": 1, **short},
    )
    folder = stages.train(recipe, tmp_path / "tokens")
    assert "quantization" not in (folder / "config.json").read_text()


def losses_of(run: Path) -> list[float]:
    history = json.loads((run / "history.json").read_text())["language_model"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_sharded_model_with_tied_embeddings_has_the_same_losses(base, tmp_path):
    """The head uses the table itself, so each process must gather all of it, whatever its layer does."""
    recipe = recipe_for(
        base,
        **{
            "language_model.training.batch_tokens": 128,
            "language_model.training.log_every": 1,
            "language_model.training.gradient_checkpointing": True,
        },
    )
    stages.train(recipe, tmp_path / "alone")
    write_recipe(with_settings(recipe, {"language_model.sharded": True}), tmp_path / "recipe.yaml")
    result = launch(2, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "sharded")
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(losses_of(tmp_path / "alone")) == 8
    assert losses_of(tmp_path / "sharded") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_chunks_of_one_token_train_with_any_optimizer(name, base, tmp_path):
    cut = {"language_model.uptraining.first_layers": 0, "language_model.uptraining.last_layers": 1}
    optimizer = {"language_model.training.optimizer.name": name, "language_model.training.steps": 2}
    folder = stages.train(recipe_for(base, chunk_size=1, **cut, **optimizer), tmp_path / "run")
    assert load_model_and_tokenizer(str(folder))[0].config.chunk_size == 1


REFUSED = {
    "nothing there": ({INIT: "nowhere"}, "nowhere"),
    "no file there": ({INIT: "nowhere.gguf"}, "there is no such file"),
    "one token": (
        {"chunk_size": 1, "language_model.uptraining.last_layers": 0},
        "set first_layers to 0, not 1",
    ),
    "too few layers": ({"language_model.uptraining.last_layers": 4}, "must not overlap"),
    "no such layer": ({"language_model.uptraining.layers": [0, 1, 2, 9]}, "between 0 and 3"),
    "other tokenizer": ({"data.tokenizer": "other"}, "has its own tokenizer"),
    "an autoencoder": ({"autoencoder.path": "other"}, "needs no trained autoencoder"),
    "long blocks": ({"data.context": 1024, "language_model.training.batch_tokens": 1024}, "context"),
    "negative": ({"language_model.uptraining.first_layers": -1}, "first_layers"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_settings_are_refused_before_anything_is_written(changes, message, base, tmp_path, capsys):
    write_recipe(recipe_for(base, **changes), tmp_path / "recipe.yaml")
    error = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert message in error and not (tmp_path / "run").exists()


def test_autoencoder_as_the_source_is_refused(base, tmp_path, capsys):
    CalmAutoencoderConfig(vocab_size=300).save_pretrained(tmp_path / "source")
    write_recipe(recipe_for(base, **{INIT: str(tmp_path / "source")}), tmp_path / "recipe.yaml")
    error = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert "holds an autoencoder, not a language model" in error and not (tmp_path / "run").exists()


def test_unsupported_architecture_of_the_source_is_refused(base, tmp_path, capsys):
    GPT2Config(vocab_size=300).save_pretrained(tmp_path / "source")
    for file in (base / "source").glob("tokenizer*"):
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    recipe = recipe_for(base, **{INIT: str(tmp_path / "source")})
    write_recipe(recipe, tmp_path / "recipe.yaml")
    error = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert "'gpt2' cannot be converted to a CALM" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["adamw", "muon", "Lion"])
def test_weights_of_the_source_have_their_own_learning_rate(name):
    settings = OptimizerSettings(name=name, learning_rate=0.1, adamw_learning_rate=0.1, source_rate=0.5)
    model = tiny_model(head_config={"head_type": "decoder"})
    new = {id(model.projection.mix.weight), id(model.head.inject.weight)}
    groups = build_optimizer(model, settings).param_groups
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    assert len(rates) == sum(weight.requires_grad for weight in model.parameters())
    assert all(rate == (0.1 if weight in new else 0.05) for weight, rate in rates.items())
    others = tiny_model(head_config={"head_type": "sequential"})
    assert {group["lr"] for group in build_optimizer(others, settings).param_groups} == {0.1}
