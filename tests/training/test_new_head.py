"""Training that begins with a CALM and gives it another head."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from toy import failure, killed_and_resumed, toy_recipe, toy_source

from calm.data.prepared import load_prepared
from calm.models.blocks import LastTokenProjection
from calm.models.loading import load_autoencoder, load_model
from calm.training import stages
from calm.training.build import language_model_of
from calm.training.continuing import with_inherited_parts
from calm.training.optimizers import build_optimizer
from calm.training.recipe import OptimizerSettings
from calm.training.recipe_files import with_settings, write_recipe

INIT, NEW = "language_model.init_from", "language_model.new_head"
CODES = {"autoencoder.kind": "codes", "autoencoder.latent_size": 32}
SEQUENTIAL = {"head_type": "sequential", "num_blocks": 1, "rank": 8, "token_size": 8}
DECODER = {"head_type": "decoder", "first_layers": 1, "last_layers": 1, "has_tied_scores": False}
CUT = {"language_model.uptraining.first_layers": 1, "language_model.uptraining.last_layers": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """CALMs: with a sequential head, uptrained with a padded embedding, and one that reads latents."""
    folder = tmp_path_factory.mktemp("base")
    source = toy_source(folder, vocab_size=304)
    recipe = toy_recipe(folder / "text.jsonl", "adamw")
    stages.train(with_settings(recipe, {**CODES, "language_model.head": SEQUENTIAL}), folder / "sequential")
    stages.train(with_settings(recipe, {INIT: str(source), **CUT}), folder / "uptrained")
    stages.train(with_settings(recipe, {"language_model.backbone_input": "both"}), folder / "latents")
    return folder


def recipe_for(base: Path, kind: str, **settings):
    recipe = toy_recipe(base / "text.jsonl", "adamw")
    return with_settings(recipe, {INIT: str(base / kind / "model"), NEW: True, **settings})


def states_of(model, ids: torch.Tensor) -> torch.Tensor:
    """States of the backbone after its last layer, before a norm."""
    seen = []
    hook = model.backbone.layers[-1].register_forward_hook(
        lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model.hidden_states_of_chunks(ids)
    hook.remove()
    return seen[0]


KINDS = {
    "sequential to energy": ("sequential", {}),
    "uptrained to energy": ("uptrained", {}),
    "uptrained to sequential": ("uptrained", {**CODES, "language_model.head": SEQUENTIAL}),
    "sequential to decoder": ("sequential", {**CODES, "language_model.head": DECODER}),
}


@pytest.mark.parametrize(("kind", "settings"), KINDS.values(), ids=KINDS)
def test_before_training_the_states_are_those_of_the_source(kind, settings, base):
    recipe = with_inherited_parts(recipe_for(base, kind, **settings))
    source = load_model(str(base / kind / "model"))
    data = load_prepared(base / kind / "data")
    config = source.config
    codes = load_autoencoder(base / kind / "model")
    autoencoder = codes if "autoencoder.kind" in settings else tiny_model(
        vocab_size=config.vocab_size
    ).autoencoder  # fmt: skip
    model = language_model_of(recipe, data, autoencoder)
    ids = torch.randint(3, 300, (3, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(states_of(model, ids), states_of(source, ids))
    assert isinstance(model.projection, LastTokenProjection) == (kind == "uptrained")
    # Other heads than the decoder read states of a common size: a norm is added where there is none.
    assert model.config.final_norm == (kind == "sequential" or model.head.config.head_type != "decoder")
    states = model.hidden_states_of_chunks(ids)[..., : config.hidden_size]
    if config.final_norm:
        assert torch.equal(states, source.hidden_states_of_chunks(ids)[..., : config.hidden_size])
    else:
        assert torch.equal(states, model.backbone.norm(states_of(source, ids)))
        assert model.backbone.norm.weight.eq(1).all()
    assert type(model.head) is not type(source.head)
    held = autoencoder.state_dict()
    assert all(torch.equal(weight, held[name]) for name, weight in model.autoencoder.state_dict().items())


def test_an_autoencoder_is_trained_first_and_a_kill_does_not_matter(base, tmp_path, monkeypatch):
    recipe = recipe_for(base, "uptrained")
    whole = stages.train(recipe, tmp_path / "whole")
    resumed = killed_and_resumed(recipe, tmp_path / "run", monkeypatch)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    model = load_model(str(whole))
    assert model.config.head.head_type == "energy" and model.config.vocab_size == 304
    history = json.loads((tmp_path / "whole/history.json").read_text())
    assert {"autoencoder", "language_model"} == history.keys()
    trained = load_file(tmp_path / "whole/autoencoder/model.safetensors")
    own = load_file(whole / "model.safetensors")
    assert all(torch.equal(own[f"autoencoder.{name}"], weight) for name, weight in trained.items())
    inputs = json.loads((tmp_path / "whole/inputs.json").read_text())
    assert f"the model '{base / 'uptrained/model'}'" in inputs
    assert len(model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4)[0]) > 4


def test_an_autoencoder_that_is_there_is_taken(base, tmp_path):
    first = stages.train_autoencoder(recipe_for(base, "sequential"), tmp_path / "first")
    recipe = recipe_for(base, "sequential", **{"autoencoder.path": str(first)})
    model = load_model(str(stages.train(recipe, tmp_path / "run")))
    held = load_file(first / "model.safetensors")
    assert all(torch.equal(weight, held[name]) for name, weight in model.autoencoder.state_dict().items())


def test_a_model_that_reads_latents_keeps_its_autoencoder(base, tmp_path):
    flow = {"head_type": "flow", "num_blocks": 1, "num_steps": 2, "frequency_size": 16}
    own = {"autoencoder.path": str(base / "latents"), "language_model.head": flow}
    model = load_model(str(stages.train(recipe_for(base, "latents", **own), tmp_path / "run")))
    assert model.config.head.head_type == "flow" and model.config.reads_latents


def test_trained_parts_have_rates_of_their_own(base):
    recipe = with_inherited_parts(recipe_for(base, "uptrained"))
    data = load_prepared(base / "uptrained/data")
    model = language_model_of(recipe, data, tiny_model(vocab_size=304).autoencoder)
    settings = OptimizerSettings(name="adamw", learning_rate=0.1, source_rate=0.5)
    groups = build_optimizer(model, settings).param_groups
    rates = {id(one): group["lr"] for group in groups for one in group["params"]}
    new = {id(one) for one in (*model.head.parameters(), model.backbone.norm.weight)}
    assert {rate for one, rate in rates.items() if one in new} == {0.1}
    assert {rate for one, rate in rates.items() if one not in new} == {0.05}


REFUSED = {
    "of nothing": ("sequential", {INIT: None}, "name one in language_model.init_from"),
    "of a Transformer": ("sequential", {INIT: "source"}, "requires a CALM, but '"),
    "other chunks": ("sequential", {"chunk_size": 8, "data.context": 64}, "and chunk_size to 4"),
    "a head of codes": ("sequential", {"language_model.head": SEQUENTIAL}, "autoencoder's kind to 'codes'"),
    "another vocabulary": (
        "uptrained",
        {"autoencoder.path": "latents"},
        "has 304 token ids, but the autoencoder 'latents' has 300",
    ),
    "other latents": ("latents", {}, "reads the latents of its own autoencoder: set autoencoder.path to"),
    "a bad head": ("sequential", {"language_model.head": {"head_type": "energy", "alpha": 3}}, "alpha"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    kind, changes, message, base, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(base)
    write_recipe(recipe_for(base, kind, **changes), tmp_path / "recipe.yaml")
    said = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert message in said and not (tmp_path / "run").exists()


def test_without_being_asked_no_head_is_lost(base, tmp_path):
    """The recipe has another head, which by itself says nothing."""
    recipe = recipe_for(base, "sequential", **{NEW: False})
    model = load_model(str(stages.train(recipe, tmp_path / "run")))
    assert recipe.language_model.head["head_type"] == "energy"
    assert model.config.head.head_type == "sequential"
