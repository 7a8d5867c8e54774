"""Resolve `precision: auto`, once per run, to what is faster on its device; a resumed run keeps that."""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from calm.hardware import MIXED_PRECISION_PAYS, mixed_precision_gain
from calm.models.loading import best_device, best_dtype
from calm.training.processes import processes
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.recipe_files import RECIPE, AnyRecipe, read_recipe_of

logger = logging.getLogger(__name__)
_WIDTH = 512  # Of the timed layers, for fine-tuning: its recipe does not say the model's width.


def with_precision(recipe: AnyRecipe, folder: Path, resume: bool) -> AnyRecipe:
    """A recipe in which no precision is "auto". All processes call this together.

    Args:
        recipe: The recipe.
        folder: The folder of its run.
        resume: Whether the run there is resumed; then it keeps its precision, on any machine.
    """
    if all(settings.precision != "auto" for settings, _ in _stages(recipe)):
        return recipe
    recipe = copy.deepcopy(recipe)
    recorded = folder / RECIPE
    if resume and recorded.is_file():
        earlier = _stages(read_recipe_of(type(recipe), str(recorded)))
        for (settings, _), (earlier_settings, _) in zip(_stages(recipe), earlier, strict=True):
            if settings.precision == "auto":
                settings.precision = earlier_settings.precision
        return recipe
    for settings, width in _stages(recipe):
        if settings.precision == "auto":
            settings.precision = _choose(width)
    return recipe


def _choose(width: int) -> Any:
    """The choice of the main process, the same for all processes."""
    choice: list[Any] = [None]
    if processes().is_main_process:
        choice = ["bf16" if _is_faster_in_bf16(width) else "fp32"]
    broadcast_object_list(choice)
    return choice[0]


def _is_faster_in_bf16(width: int) -> bool:
    device = best_device()
    if device.type != "cpu":
        return best_dtype(device) is torch.bfloat16
    gain = mixed_precision_gain(device, width)
    logger.info("precision: layers of width %d train %.1f times as fast in bf16 as in fp32 here", width, gain)
    return gain >= MIXED_PRECISION_PAYS


def _stages(recipe: Any) -> list[tuple[TrainingSettings, int]]:
    """The settings of each stage, and the width of its layers."""
    if not isinstance(recipe, Recipe):
        return [(recipe.training, _WIDTH)]
    return [
        (recipe.autoencoder.training, recipe.autoencoder.hidden_size),
        (recipe.language_model.training, recipe.language_model.hidden_size),
    ]
