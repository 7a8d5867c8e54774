"""Training that starts from the weights of a trained model: on other text, in a run of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import failure, interrupt, killed_and_resumed, toy_recipe

from calm.cli import main
from calm.data.stories import write_stories
from calm.facts import facts_of
from calm.flops import training_flops
from calm.models.loading import load_language_model_and_tokenizer
from calm.training import stages
from calm.training.continuing import config_to_continue
from calm.training.recipe_files import with_settings, write_recipe

INIT = "language_model.init_from"
AUTOREGRESSIVE = {"model": "autoregressive", "chunk_size": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Two texts, and a CALM and a baseline trained on the first."""
    folder = tmp_path_factory.mktemp("base")
    for name, seed in (("text", 0), ("other", 5)):
        write_stories(folder / f"{name}.jsonl", seed, 12)
    recipe = toy_recipe(folder / "text.jsonl")
    stages.train(recipe, folder / "calm")
    stages.train(with_settings(recipe, AUTOREGRESSIVE), folder / "plain")
    return folder


def recipe_for(base: Path, kind: str, **settings):
    changes = {INIT: str(base / kind / "model"), **(AUTOREGRESSIVE if kind == "plain" else {}), **settings}
    return with_settings(toy_recipe(base / "other.jsonl"), changes)


@pytest.mark.parametrize("kind", ["calm", "plain"])
def test_training_starts_from_the_weights_of_the_model(kind, base, tmp_path):
    """With learning rates of zero, they are also those that training ends with."""
    zero_rates = {"language_model.training.optimizer.learning_rate": 0.0,
             "language_model.training.optimizer.adamw_learning_rate": 0.0}  # fmt: skip
    folder = stages.train(recipe_for(base, kind, **zero_rates), tmp_path / "zero_rates")
    before, after = (load_file(path / "model.safetensors") for path in (base / kind / "model", folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = load_file(stages.train(recipe_for(base, kind), tmp_path / "trained") / "model.safetensors")
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    frozen = [name for name in before if name.startswith("autoencoder.")]
    assert all(torch.equal(before[name], trained[name]) for name in frozen)
    files = [base / kind / "model/tokenizer.json", folder / "tokenizer.json"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("named", ["run", "model"])
def test_sizes_in_the_recipe_are_ignored_and_a_killed_run_resumes(named, base, tmp_path, monkeypatch):
    init_from = str(base / "calm" if named == "run" else base / "calm/model")
    recipe = recipe_for(
        base, "calm", **{INIT: init_from, "language_model.hidden_size": 8, "autoencoder.latent_size": 64}
    )
    uninterrupted = stages.train(recipe, tmp_path / "uninterrupted")
    resumed = killed_and_resumed(recipe, tmp_path / "run", monkeypatch)
    assert (uninterrupted / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert json.loads((uninterrupted / "config.json").read_text())["backbone_config"]["hidden_size"] == 16


@pytest.mark.parametrize("kind", ["calm", "plain"])
def test_training_on_text_removes_the_thoughts_of_a_model(kind, base, tmp_path, caplog):
    """Otherwise it would still think before every text."""
    source = shutil.copytree(base / kind / "model", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["thoughts"] = {"number": 2, "begin": 2, "end": 1}
    (source / "config.json").write_text(json.dumps(config))
    (source / "checksums.json").unlink()
    folder = stages.train(recipe_for(base, kind, **{INIT: str(source)}), tmp_path / "run")
    assert json.loads((folder / "config.json").read_text()).get("thoughts") is None
    assert "trained on text, it will no longer use them" in caplog.text


def test_shipped_model_can_be_trained_further(base, tmp_path):
    recipe = recipe_for(base, "calm", **{INIT: "stories", "language_model.training.steps": 1})
    assert (stages.train(recipe, tmp_path / "run") / "model.safetensors").is_file()


def test_second_stage_uses_the_loss_of_its_recipe(base, tmp_path):
    head = {"head_type": "parallel", "token_size": 4, "rank": 4}
    first = with_settings(
        toy_recipe(base / "text.jsonl"),
        {"autoencoder.kind": "codes", "autoencoder.latent_size": 32, "language_model.head": head},
    )
    model = stages.train(first, tmp_path / "first")
    folders = {}
    for loss in ("cross_entropy", "brier"):
        settings = {INIT: str(model), "language_model.head": {"head_type": "parallel", "loss": loss}}
        folders[loss] = stages.train(with_settings(first, settings), tmp_path / loss)
        saved = json.loads((folders[loss] / "config.json").read_text())["head_config"]
        assert (saved["loss"], saved["rank"]) == (loss, 4)
    weights, others = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
    # Settings for a head of another type are ignored.
    settings = {INIT: str(folders["brier"]), "language_model.head": {"head_type": "sequential"}}
    again = stages.train(with_settings(first, settings), tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["head_config"]["loss"] == "brier"


PARALLEL = {"head_type": "parallel", "token_size": 4, "rank": 4}
WRONG_HEADS = {
    "an unknown loss": ({"loss": "brrier"}, "loss must be one of cross_entropy, brier, got 'brrier'"),
    "a misspelt field": ({"lss": "brier"}, "the parallel head has no field 'lss'; did you mean 'loss'?"),
    "a field of another head": ({"head_type": "sequential", "loss": "brier"}, "has no field 'loss'"),
}


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """A recipe, and the model that it trains: with a parallel head and token classes."""
    folder = tmp_path_factory.mktemp("parallel")
    write_stories(folder / "text.jsonl", 0, 12)
    head = PARALLEL | {"num_classes": 20}
    recipe = with_settings(
        toy_recipe(folder / "text.jsonl"),
        {"autoencoder.kind": "codes", "autoencoder.latent_size": 32, "language_model.head": head},
    )
    return recipe, stages.train(recipe, folder / "run")


@pytest.mark.parametrize(("head", "message"), WRONG_HEADS.values(), ids=WRONG_HEADS)
def test_invalid_head_settings_are_refused_although_the_model_has_a_head(
    head, message, parallel, tmp_path, capsys
):
    """Otherwise, after a misspelt loss, the second stage would silently use that of the first."""
    recipe, model = parallel
    changes = {INIT: str(model), "language_model.head": {"head_type": "parallel"} | head}
    write_recipe(with_settings(recipe, changes), tmp_path / "recipe.yaml")
    error = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert message in error and not (tmp_path / "run").exists()


def test_flops_of_a_second_stage_depend_on_its_loss(parallel):
    recipe, model = parallel
    flops = {}
    for loss in ("cross_entropy", "brier"):
        settings = {INIT: str(model), "language_model.head": {"head_type": "parallel", "loss": loss}}
        config = config_to_continue(with_settings(recipe, settings))
        assert config.head.loss == loss
        flops[loss] = training_flops(config, recipe.data.context)
    assert flops["brier"] > flops["cross_entropy"]


def test_the_report_does_not_call_a_brier_score_nats(parallel):
    recipe, model = parallel
    model, _ = load_language_model_and_tokenizer(str(model))
    assert facts_of(recipe, model, {}).has_loss_in_nats
    model.change_training(loss="brier")
    assert not facts_of(recipe, model, {}).has_loss_in_nats


REFUSED = {
    "nothing there": ({INIT: "nowhere"}, "nowhere"),
    "other chunks": ({"chunk_size": 8, "data.context": 64}, "set model to calm and chunk_size to 4"),
    "other kind": (AUTOREGRESSIVE, "set model to calm and chunk_size to 4"),
    "other tokenizer": ({"data.tokenizer": "other"}, "has its own tokenizer"),
    "other autoencoder": ({"autoencoder.path": "other"}, "has its own autoencoder"),
    "long blocks": ({"data.context": 65536, "language_model.training.batch_tokens": 65536}, "context"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_settings_are_refused_before_anything_is_written(changes, message, base, tmp_path, capsys):
    write_recipe(recipe_for(base, "calm", **changes), tmp_path / "recipe.yaml")
    error = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert message in error and not (tmp_path / "run").exists()


def test_text_prepared_with_another_tokenizer_is_refused(base, tmp_path, capsys):
    main(["prepare", str(base / "other.jsonl"), "--output", str(tmp_path / "data"), "--vocab_size", "290"])
    write_recipe(
        recipe_for(base, "calm", **{"data.sources": str(tmp_path / "data")}), tmp_path / "recipe.yaml"
    )
    error = failure(capsys, "train", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert "was prepared with a different tokenizer" in error and not (tmp_path / "run").exists()


def test_resuming_is_refused_after_the_source_model_was_replaced(base, tmp_path, monkeypatch, capsys):
    recipe = recipe_for(base, "calm")
    model = tmp_path / "model"
    shutil.copytree(base / "calm/model", model)
    recipe = with_settings(recipe, {INIT: str(model)})
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 5)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "run")
    other = stages.train(
        with_settings(toy_recipe(base / "text.jsonl"), {"language_model.training.steps": 9}),
        tmp_path / "again",
    )
    shutil.rmtree(model)
    shutil.copytree(other, model)
    error = failure(capsys, "train", "--resume", "--output", tmp_path / "run")
    assert "changed since the run began" in error or "belongs to another run" in error
