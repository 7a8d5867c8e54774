"""Training costs: computed from a recipe, read from a history."""

import json

import pytest

from calm.comparison.costs import (
    affordable_steps,
    autoencoder_flops,
    language_model_flops,
    pretrained_parts,
    record_of,
)
from calm.comparison.measures import _open_data
from calm.errors import InputError
from calm.flops import training_flops
from calm.training.build import model_config
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe_files import read_recipe, with_settings, write_recipe

VOCABULARY = 300


@pytest.fixture
def recipe():
    return read_recipe("cpu_tiny")


def test_flops_are_proportional_to_steps_and_tokens(recipe):
    config = model_config(recipe, VOCABULARY)
    flops_per_token = training_flops(config, recipe.data.context)
    assert language_model_flops(recipe, VOCABULARY) == pytest.approx(flops_per_token * 500 * 2048)
    more = with_settings(recipe, {"autoencoder.training.steps": 1600})
    assert autoencoder_flops(more, VOCABULARY) == pytest.approx(2 * autoencoder_flops(recipe, VOCABULARY))


@pytest.mark.parametrize(
    "changes", [{"model": "autoregressive", "chunk_size": 1}, {"autoencoder.path": "somewhere"}]
)
def test_autoencoder_that_is_not_trained_costs_nothing(changes, recipe):
    assert autoencoder_flops(recipe, VOCABULARY) > 0
    assert autoencoder_flops(with_settings(recipe, changes), VOCABULARY) == 0


@pytest.mark.parametrize(
    ("changes", "excluded"),
    [
        ({}, ()),
        ({"model": "autoregressive", "chunk_size": 1, "autoencoder.path": "a"}, ()),
        ({"autoencoder.path": "a"}, ("its autoencoder",)),
        ({"language_model.init_from": "a", "autoencoder.path": "a"}, ("the model that it started from",)),
        (
            {"language_model.init_from": "a", "language_model.new_head": True, "autoencoder.path": "b"},
            ("the model that it started from", "its autoencoder"),
        ),
        (
            {"language_model.init_from": "a", "language_model.new_head": True},
            ("the model that it started from",),
        ),
    ],
)
def test_parts_trained_before_a_run_are_excluded(changes, excluded, recipe):
    assert pretrained_parts(with_settings(recipe, changes)) == excluded


def test_the_record_of_a_run_excludes_what_was_trained_before(recipe, tmp_path):
    assert record_of(tmp_path, write_run(tmp_path, recipe, [])).excluded == ()
    config = write_run(tmp_path, with_settings(recipe, {"autoencoder.path": "a"}), [])
    assert record_of(tmp_path, config).excluded == ("its autoencoder",)


def test_affordable_steps_spend_the_budget(recipe):
    total = language_model_flops(recipe, VOCABULARY) + autoencoder_flops(recipe, VOCABULARY)
    assert affordable_steps(recipe, VOCABULARY, total) == 500
    steps = affordable_steps(recipe, VOCABULARY, total / 2)
    assert 0 < steps < 250  # The autoencoder is trained in full.
    assert affordable_steps(recipe, VOCABULARY, autoencoder_flops(recipe, VOCABULARY) / 2) < 0


def write_run(folder, recipe, language_model):
    history = {"autoencoder": [{"seconds": 30.0, "train_runtime": 9.0}], "language_model": language_model}
    write_recipe(recipe, folder / "recipe.yaml")
    (folder / "history.json").write_text(json.dumps(history))
    return model_config(recipe, VOCABULARY)


def test_the_record_of_a_run_is_what_it_logged(recipe, tmp_path):
    config = write_run(
        tmp_path,
        recipe,
        [
            {"step": 20, "loss": 3.0},
            {"step": 250, "eval_brier_lm": 0.0, "eval_brier_1": 9.0},
            {"step": 500, "eval_brier_lm": 7.0, "eval_brier_1": 12.0, "eval_cross_entropy": 2.5},
            {"train_runtime": 40.0, "seconds": 60.0},
        ],
    )
    record = record_of(tmp_path, config)
    before, total = autoencoder_flops(recipe, VOCABULARY), language_model_flops(recipe, VOCABULARY)
    assert record.seconds == 90 and record.flops == pytest.approx(before + total)
    half, end = record.checkpoints
    assert half.flops == pytest.approx(before + total / 2) and end.flops == record.flops
    assert (half.brier_lm, half.brier_1, half.cross_entropy) == (None, 9.0, None)
    assert (end.brier_lm, end.brier_1, end.cross_entropy) == (7.0, 12.0, 2.5)


def test_time_is_unknown_if_the_run_logged_no_seconds(recipe, tmp_path):
    config = write_run(tmp_path, recipe, [{"step": 20, "loss": 3.0}, {"train_runtime": 40.0}])
    assert record_of(tmp_path, config).seconds is None


def test_folder_without_recipe_or_history_has_no_record(recipe, tmp_path):
    config = model_config(recipe, VOCABULARY)
    assert record_of(tmp_path, config) is None
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert record_of(tmp_path, config) is None


@pytest.mark.parametrize("entry", [3, {"eval_brier_lm": 1.0}, {"eval_brier_lm": 1.0, "step": "x"}])
def test_damaged_history_is_refused_with_advice(entry, recipe, tmp_path):
    config = write_run(tmp_path, recipe, [entry])
    with pytest.raises(
        InputError, match=r"history.json' is damaged .*give '.*model' to leave out training costs"
    ):
        record_of(tmp_path, config)


def test_fine_tuned_run_has_neither_a_record_nor_a_text_to_score(recipe, tmp_path):
    write_recipe(FinetuningRecipe(model="stories"), tmp_path / "recipe.yaml")
    (tmp_path / "history.json").write_text("[]")
    assert record_of(tmp_path, model_config(recipe, VOCABULARY)) is None
    with pytest.raises(InputError, match="pass it with --data"):
        _open_data(tmp_path, None)
