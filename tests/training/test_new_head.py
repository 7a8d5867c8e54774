"""Training that starts from a CALM and gives it another head."""

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
    """States after the last layer of the backbone, before its norm."""
    states = []
    hook = model.backbone.layers[-1].register_forward_hook(
        lambda module, inputs, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model.hidden_states_of_chunks(ids)
    hook.remove()
    return states[0]


KINDS = {
    "sequential to energy": ("sequential", {}),
    "uptrained to energy": ("uptrained", {}),
    "uptrained to sequential": ("uptrained", {**CODES, "language_model.head": SEQUENTIAL}),
    "sequential to decoder": ("sequential", {**CODES, "language_model.head": DECODER}),
}


@pytest.mark.parametrize(("kind", "settings"), KINDS.values(), ids=KINDS)
def test_new_model_starts_with_the_backbone_states_of_its_source(kind, settings, base):
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
    # Heads other than the decoder expect states of a common size: without a norm, one is added.
    assert model.config.final_norm == (kind == "sequential" or model.head.config.head_type != "decoder")
    states = model.hidden_states_of_chunks(ids)[..., : config.hidden_size]
    if config.final_norm:
        assert torch.equal(states, source.hidden_states_of_chunks(ids)[..., : config.hidden_size])
    else:
        assert torch.equal(states, model.backbone.norm(states_of(source, ids)))
        assert model.backbone.norm.weight.eq(1).all()
    assert type(model.head) is not type(source.head)
    expected = autoencoder.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.autoencoder.state_dict().items())


def test_autoencoder_is_trained_first_and_a_killed_run_resumes(base, tmp_path, monkeypatch):
    recipe = recipe_for(base, "uptrained")
    uninterrupted = stages.train(recipe, tmp_path / "uninterrupted")
    resumed = killed_and_resumed(recipe, tmp_path / "run", monkeypatch)
    assert (uninterrupted / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    model = load_model(str(uninterrupted))
    assert model.config.head.head_type == "energy" and model.config.vocab_size == 304
    history = json.loads((tmp_path / "uninterrupted/history.json").read_text())
    assert {"autoencoder", "language_model"} == history.keys()
    trained = load_file(tmp_path / "uninterrupted/autoencoder/model.safetensors")
    weights = load_file(uninterrupted / "model.safetensors")
    assert all(torch.equal(weights[f"autoencoder.{name}"], weight) for name, weight in trained.items())
    inputs = json.loads((tmp_path / "uninterrupted/inputs.json").read_text())
    assert f"the model '{base / 'uptrained/model'}'" in inputs
    assert len(model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4)[0]) > 4


def test_given_autoencoder_is_used(base, tmp_path):
    autoencoder = stages.train_autoencoder(recipe_for(base, "sequential"), tmp_path / "autoencoder")
    recipe = recipe_for(base, "sequential", **{"autoencoder.path": str(autoencoder)})
    model = load_model(str(stages.train(recipe, tmp_path / "run")))
    expected = load_file(autoencoder / "model.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in model.autoencoder.state_dict().items())


def test_a_model_that_reads_latents_keeps_its_autoencoder(base, tmp_path):
    flow = {"head_type": "flow", "num_blocks": 1, "num_steps": 2, "frequency_size": 16}
    settings = {"autoencoder.path": str(base / "latents"), "language_model.head": flow}
    model = load_model(str(stages.train(recipe_for(base, "latents", **settings), tmp_path / "run")))
    assert model.config.head.head_type == "flow" and model.config.reads_latents


def test_weights_of_the_source_have_their_own_learning_rate(base):
    recipe = with_inherited_parts(recipe_for(base, "uptrained"))
    data = load_prepared(base / "uptrained/data")
    model = language_model_of(recipe, data, tiny_model(vocab_size=304).autoencoder)
    settings = OptimizerSettings(name="adamw", learning_rate=0.1, source_rate=0.5)
    groups = build_optimizer(model, settings).param_groups
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    new = {id(weight) for weight in (*model.head.parameters(), model.backbone.norm.weight)}
    assert {rate for weight, rate in rates.items() if weight in new} == {0.1}
    assert {rate for weight, rate in rates.items() if weight not in new} == {0.05}


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
def test_invalid_settings_are_refused_before_anything_is_written(
    kind, changes, message, base, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(base)
    write_recipe(recipe_for(base, kind, **changes), tmp_path / "recipe.yaml")
    error = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert message in error and not (tmp_path / "run").exists()


def test_head_is_replaced_only_on_request(base, tmp_path):
    """That the recipe has another head is not a request."""
    recipe = recipe_for(base, "sequential", **{NEW: False})
    model = load_model(str(stages.train(recipe, tmp_path / "run")))
    assert recipe.language_model.head["head_type"] == "energy"
    assert model.config.head.head_type == "sequential"
