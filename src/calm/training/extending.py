"""Give a run more steps than it started with.

The existing model is kept as model-STEPS, and training continues from a checkpoint. If the learning rate up
to that checkpoint is the same for both numbers of steps, the result is that of a run with all steps from the
start. This holds for "constant", and for "warmup_stable_decay" from the checkpoint where the decay began,
which is kept for this. Other schedules decay from the start, and steps already taken at the lower learning
rate cannot be undone.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from calm.errors import InputError
from calm.storage.folders import unused_path
from calm.training.checkpoints import checkpoints_in, remove_checkpoints, step_of
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.optimizers import last_step_at_peak
from calm.training.recipe import Recipe, TrainingSettings

logger = logging.getLogger(__name__)
# The setting that extends a run: the steps of its last stage.
STEPS_OF_LAST_STAGE: dict[type, str] = {
    Recipe: "language_model.training.steps",
    FinetuningRecipe: "training.steps",
}
_RESULTS = ("model", "adapter", "report.html")


def last_stage(recipe: Recipe | FinetuningRecipe) -> TrainingSettings:
    """The training settings of a run's last stage."""
    return recipe.language_model.training if isinstance(recipe, Recipe) else recipe.training


def without_last_steps(recipe: Any) -> Any:
    """A recipe with the default steps in its last stage, so those that differ only there become equal."""
    training = dataclasses.replace(last_stage(recipe), steps=TrainingSettings().steps)
    if isinstance(recipe, FinetuningRecipe):
        return dataclasses.replace(recipe, training=training)
    language_model = dataclasses.replace(recipe.language_model, training=training)
    return dataclasses.replace(recipe, language_model=language_model)


def checkpoints_of_last_stage(folder: Path, recipe: Any) -> Path:
    """Where the last stage of a run keeps its checkpoints."""
    return folder / ("checkpoints/language_model" if isinstance(recipe, Recipe) else "checkpoints")


def check_more_steps(folder: Path, recorded: Any, recipe: Any) -> None:
    """Check that a run can be given the steps of a recipe that is otherwise the same.

    Args:
        folder: Folder of the run.
        recorded: The recipe on record in that folder.
        recipe: The recipe with another number of steps.

    Raises:
        InputError: If it has fewer steps.
    """
    before, now = last_stage(recorded).steps, last_stage(recipe).steps
    if now < before:
        raise InputError(
            f"the run in '{folder}' has {before:,} steps, and the number can only be raised: set "
            f"{STEPS_OF_LAST_STAGE[type(recipe)]} above {before}, or choose another output folder."
        )


def extend_run(folder: Path, recorded: Any, recipe: Any) -> None:
    """Prepare the folder of a run for more steps; if killed in between, the run can still be resumed.

    Args:
        folder: Folder of the run.
        recorded: The recipe on record in that folder.
        recipe: The same recipe with more steps.
    """
    training, steps = last_stage(recorded), f"{last_stage(recipe).steps:,}"
    for name in _RESULTS:
        if (result := folder / name).exists():
            renamed = unused_path(folder / f"{result.stem}-{training.steps}{result.suffix}")
            result.rename(renamed)
            logger.info("'%s' is kept as '%s'", result, renamed.name)
    checkpoints = checkpoints_in(checkpoints_of_last_stage(folder, recipe))
    if not checkpoints:
        return
    last = _last_common_step(training)
    valid = [checkpoint for checkpoint in checkpoints if step_of(checkpoint) <= last]
    # Going back pays only if a stable phase precedes the decay; otherwise only the warm-up would be left.
    if valid and (valid == checkpoints or kept_step(training) is not None):
        # Later ones were trained at a learning rate that would not have decayed yet with more steps.
        remove_checkpoints(checkpoints[len(valid) :])
        start = f"{step_of(valid[-1]):,}"
        logger.info("continuing from step %s, as if there had been %s steps from the start", start, steps)
        return
    logger.warning(
        "continuing from step %s on a schedule of %s steps. Its learning rate so far followed one of %s, "
        "so the result is not that of a run with %s steps from the start.",
        f"{step_of(checkpoints[-1]):,}",
        steps,
        f"{training.steps:,}",
        steps,
    )


def _last_common_step(training: TrainingSettings) -> int:
    """The last step up to which a run with more steps would have had the same learning rates."""
    schedule, steps = training.optimizer, training.steps
    return 0 if schedule.warmup_steps > steps else last_step_at_peak(schedule, steps)


def kept_step(training: TrainingSettings) -> int | None:
    """The step whose checkpoint is kept for extending the run: where the decay starts, if it has one."""
    is_stable = training.optimizer.schedule == "warmup_stable_decay"
    return (_last_common_step(training) or None) if is_stable else None


class SaveAt(TrainerCallback):
    """Requests a checkpoint after a step.

    Args:
        step: The step; None for no checkpoint.
    """

    def __init__(self, step: int | None) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request it, if this was the step."""
        if state.global_step == self._step:
            control.should_save = True
