"""`precision: auto` picks what is faster on this machine, and a resumed run keeps its choice."""

import pytest
import torch

from calm.training import precision
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.precision import with_precision
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, write_recipe


def recipe_of(autoencoder, language_model):
    recipe = Recipe()
    recipe.autoencoder.training.precision = autoencoder
    recipe.language_model.training.precision = language_model
    recipe.language_model.hidden_size = 768
    return recipe


def precisions(recipe):
    return recipe.autoencoder.training.precision, recipe.language_model.training.precision


@pytest.mark.parametrize(("gain", "expected"), [(2.0, "bf16"), (1.0, "fp32"), (0.02, "fp32")])
def test_auto_picks_bf16_only_if_it_is_faster(gain, expected, monkeypatch, tmp_path):
    widths = []
    monkeypatch.setattr(precision, "mixed_precision_gain", lambda _, width: widths.append(width) or gain)
    recipe = recipe_of("fp32", "auto")
    assert precisions(with_precision(recipe, tmp_path, False)) == ("fp32", expected)
    assert widths == [768]
    assert precisions(recipe) == ("fp32", "auto")  # The caller's recipe is not changed.
    finetuning = FinetuningRecipe()
    finetuning.training.precision = "auto"
    assert with_precision(finetuning, tmp_path, False).training.precision == expected


def test_explicit_precision_is_kept_without_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "mixed_precision_gain", None)
    recipe = recipe_of("bf16", "fp32")
    assert with_precision(recipe, tmp_path, False) is recipe


def test_resumed_run_keeps_its_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "mixed_precision_gain", lambda *_: 9.0)
    write_recipe(recipe_of("bf16", "fp32"), tmp_path / RECIPE)
    assert precisions(with_precision(recipe_of("auto", "auto"), tmp_path, True)) == ("bf16", "fp32")
    assert precisions(with_precision(recipe_of("auto", "auto"), tmp_path, False)) == ("bf16", "bf16")
    # An explicit precision is never replaced, so that a difference is noticed.
    assert precisions(with_precision(recipe_of("auto", "bf16"), tmp_path, True)) == ("bf16", "bf16")


def test_accelerator_gets_its_best_dtype_without_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "mixed_precision_gain", None)
    monkeypatch.setattr(precision, "best_device", lambda: torch.device("cuda"))
    for dtype, expected in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        monkeypatch.setattr(precision, "best_dtype", lambda _, dtype=dtype: dtype)
        assert precisions(with_precision(recipe_of("auto", "bf16"), tmp_path, False)) == (expected, "bf16")
