"""Training cost of a run, computed from its recipe and read from its history."""

import dataclasses
from pathlib import Path

from transformers import PreTrainedConfig

from calm.data.chunking import BlockSettings
from calm.errors import InputError, reason_of
from calm.flops import training_flops
from calm.report.measured import Checkpoint
from calm.storage.disk import read_json
from calm.training.blocks import block_settings
from calm.training.build import autoencoder_config, model_config
from calm.training.clock import seconds_of
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, read_recipe
from calm.training.recipe_settings import kind_of_recipe
from calm.training.runs import HISTORY
from calm.training.teacher import read_teacher_facts, teacher_config


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """Training cost of a run, and its scores during training.

    Args:
        flops: FLOPs of all stages of the run.
        seconds: Time of all stages, including held-out evaluations; None if unknown.
        checkpoints: Cost and scores at each evaluation of the language model.
        excluded: What was trained before the run; see `pretrained_parts`.
    """

    flops: float
    seconds: float | None
    checkpoints: list[Checkpoint]
    excluded: tuple[str, ...]


def recipe_of_run(run: Path) -> Recipe | None:
    """The recipe of a run of `calm train`; None for a bare model folder, or for a run of `calm finetune`."""
    file = run / RECIPE
    if not file.is_file() or kind_of_recipe(str(file)) is not Recipe:
        return None
    return read_recipe(str(file))


def blocks_of_run(run: Path, block_size: int) -> BlockSettings:
    """How the recipe of a run lays out text; without one, as documents in blocks of `block_size` tokens."""
    recipe = recipe_of_run(run)
    return BlockSettings(block_size) if recipe is None else block_settings(recipe)


def record_of(run: Path, config: PreTrainedConfig) -> TrainingRecord | None:
    """The training record of a run; None for a bare model folder, or for a run of `calm finetune`.

    The folder of such a run does not say what training the model cost that it started from.

    Args:
        run: Folder of the run.
        config: Configuration of its language model.
    """
    recipe = recipe_of_run(run)
    if recipe is None or not (run / HISTORY).is_file():
        return None
    history = read_json(run / HISTORY, dict)
    tokens = recipe.language_model.training.tokens
    model_flops = training_flops(config, recipe.data.context) * tokens
    if (teacher := read_teacher_facts(run)) is not None:
        model_flops += teacher.flops_per_token * tokens
    steps, flops_before = recipe.language_model.training.steps, autoencoder_flops(recipe, config.vocab_size)
    try:
        return TrainingRecord(
            flops=flops_before + model_flops,
            seconds=seconds_of(history.values()),
            checkpoints=[
                Checkpoint(
                    flops_before + model_flops * entry["step"] / steps,
                    entry["eval_brier_lm"] or None,
                    entry["eval_brier_1"],
                    entry.get("eval_cross_entropy"),
                )
                for entry in history["language_model"]
                if "eval_brier_lm" in entry
            ],
            excluded=pretrained_parts(recipe),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{run / HISTORY}' is damaged ({reason_of(error)}); restore it, or give '{run / 'model'}' to "
            "leave out training costs."
        ) from error


def pretrained_parts(recipe: Recipe) -> tuple[str, ...]:
    """The parts of a model that its run did not train first, so that no cost of the run includes them.

    Args:
        recipe: A recipe after `calm.training.continuing.with_inherited_parts`, as runs have it.
    """
    settings, parts = recipe.language_model, list[str]()
    if settings.init_from is not None:
        parts.append("the model that it started from")
    # The autoencoder of the model that it started from is part of that model.
    is_included = settings.init_from is not None and not settings.new_head
    if recipe.model == "calm" and recipe.autoencoder.path is not None and not is_included:
        parts.append("its autoencoder")
    return tuple(parts)


def language_model_flops(recipe: Recipe, vocab_size: int) -> float:
    """Training FLOPs of the language model, including its teacher's."""
    per_token = _flops_per_token(recipe, vocab_size)
    return per_token * recipe.language_model.training.tokens


def autoencoder_flops(recipe: Recipe, vocab_size: int) -> float:
    """Training FLOPs of the autoencoder; 0 if the recipe trains none.

    Args:
        recipe: As for `pretrained_parts`; it names an autoencoder that is kept.
        vocab_size: Number of token ids.
    """
    if not recipe.trains_autoencoder:
        return 0.0
    per_token = training_flops(autoencoder_config(recipe, vocab_size, {}), recipe.data.context)
    return per_token * recipe.autoencoder.training.tokens


def affordable_steps(recipe: Recipe, vocab_size: int, flops: float) -> int:
    """Language model steps that a FLOPs budget allows after training the autoencoder."""
    per_token = _flops_per_token(recipe, vocab_size)
    per_step = per_token * recipe.language_model.training.batch_tokens
    return round((flops - autoencoder_flops(recipe, vocab_size)) / per_step)


def _flops_per_token(recipe: Recipe, vocab_size: int) -> float:
    return training_flops(model_config(recipe, vocab_size), recipe.data.context, teacher_config(recipe))
