"""A run that is given more steps than it began with.

The model that it made is kept as model-STEPS, and training goes on from a checkpoint. Where the rate was the
same under both numbers of steps up to that checkpoint, the result is that of a run with all steps from the
start: always with a constant schedule, and with "warmup_stable_decay" from the checkpoint where the decay
began, which is kept for this. Other schedules fall from the beginning, and what was trained with the lower
rate stays trained.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from calm.errors import InputError
from calm.storage.folders import free_name
from calm.training.checkpoints import checkpoints_in, remove_checkpoints, step_of
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.optimizers import last_step_at_peak
from calm.training.recipe import Recipe, TrainingSettings

logger = logging.getLogger(__name__)
# What a larger number of steps extends: the last stage of a run.
STEPS_OF_LAST_STAGE: dict[type, str] = {
    Recipe: "language_model.training.steps",
    FinetuningRecipe: "training.steps",
}
_RESULTS = ("model", "adapter", "report.html")


def last_stage(recipe: Recipe | FinetuningRecipe) -> TrainingSettings:
    """How the last stage of a run trains."""
    return recipe.language_model.training if isinstance(recipe, Recipe) else recipe.training


def without_last_steps(recipe: Any) -> Any:
    """A recipe as all those that differ in the steps of the last stage alone: with the default."""
    training = dataclasses.replace(last_stage(recipe), steps=TrainingSettings().steps)
    if isinstance(recipe, FinetuningRecipe):
        return dataclasses.replace(recipe, training=training)
    language_model = dataclasses.replace(recipe.language_model, training=training)
    return dataclasses.replace(recipe, language_model=language_model)


def checkpoints_of_last_stage(folder: Path, recipe: Any) -> Path:
    """Where the last stage of a run in a folder keeps its checkpoints."""
    return folder / ("checkpoints/language_model" if isinstance(recipe, Recipe) else "checkpoints")


def check_more_steps(folder: Path, noted: Any, recipe: Any) -> None:
    """Check that a run can be given the steps of a recipe that differs in nothing else.

    Args:
        folder: Folder of the run.
        noted: The recipe that the run follows.
        recipe: The recipe with another number of steps.

    Raises:
        InputError: If they are fewer.
    """
    before, now = last_stage(noted).steps, last_stage(recipe).steps
    if now < before:
        raise InputError(
            f"the run in '{folder}' has {before:,} steps and can be given more, not fewer: set "
            f"{STEPS_OF_LAST_STAGE[type(recipe)]} above {before}, or choose another output folder."
        )


def extend(folder: Path, noted: Any, recipe: Any) -> None:
    """Make the folder of a run ready for more steps; a kill meanwhile leaves a run that can be resumed.

    Args:
        folder: Folder of the run.
        noted: The recipe that the run follows.
        recipe: The same recipe with more steps.
    """
    training, steps = last_stage(noted), f"{last_stage(recipe).steps:,}"
    for name in _RESULTS:
        if (result := folder / name).exists():
            kept = free_name(folder / f"{result.stem}-{training.steps}{result.suffix}")
            result.rename(kept)
            logger.info("'%s' is kept as '%s'", result, kept.name)
    checkpoints = checkpoints_in(checkpoints_of_last_stage(folder, recipe))
    if not checkpoints:
        return
    same = [checkpoint for checkpoint in checkpoints if step_of(checkpoint) <= _last_common_step(training)]
    # Only a decay is worth going back for: before one that fills the run lies no more than the warm-up.
    if same and (same == checkpoints or kept_step(training) is not None):
        # Later ones were trained with a rate that had fallen, as it would not have with more steps.
        remove_checkpoints(checkpoints[len(same) :])
        start = f"{step_of(same[-1]):,}"
        logger.info("going on from step %s, as if there had been %s steps from the start", start, steps)
        return
    logger.warning(
        "going on from step %s by a schedule of %s steps. It had another rate before, by one of %s: the "
        "result is not that of a run with %s steps from the start.",
        f"{step_of(checkpoints[-1]):,}",
        steps,
        f"{training.steps:,}",
        steps,
    )


def _last_common_step(training: TrainingSettings) -> int:
    """The last step up to which a run with more steps would have had the same rates."""
    schedule, steps = training.optimizer, training.steps
    return 0 if schedule.warmup_steps > steps else last_step_at_peak(schedule, steps)


def kept_step(training: TrainingSettings) -> int | None:
    """The step whose checkpoint is kept for runs that are extended: where a decay begins."""
    is_stable = training.optimizer.schedule == "warmup_stable_decay"
    return (_last_common_step(training) or None) if is_stable else None


class SaveAt(TrainerCallback):
    """Asks for a checkpoint after a step.

    Args:
        step: The step; None for no checkpoint.
    """

    def __init__(self, step: int | None) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask, if this was the step."""
        if state.global_step == self._step:
            control.should_save = True
