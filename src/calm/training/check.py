"""Mistakes in a recipe, found before any work is done."""

import logging

import torch
from transformers import AutoModelForCausalLM

from calm.core.brier import NUM_ORDERS, window_of
from calm.data.chunking import check_block_size
from calm.errors import InputError, reason_of
from calm.ranges import NUM_THOUGHTS
from calm.training.build import model_config
from calm.training.curriculum import Curriculum
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.optimizers import check_optimizer
from calm.training.probing import check_attention, check_compiler, check_memory
from calm.training.ranges import check_ranges
from calm.training.recipe import OptimizerSettings, Recipe, TrainingSettings
from calm.training.recipe_files import check_types
from calm.training.teacher import check_teacher
from calm.training.trackers import check_trackers

logger = logging.getLogger(__name__)
_HIGHEST_ADAMW_RATE = 0.01


def check_recipe(recipe: Recipe, num_processes: int = 1) -> None:
    """Check a recipe.

    Raises:
        InputError: If a setting has the wrong type, no text is named, a tracker is missing, or the recipe
            does not make a model.
    """
    check_types(recipe)
    if not recipe.data.source_list:
        raise InputError("the recipe names no text; pass --data.sources FILE or a folder of `calm prepare`.")
    data = recipe.data
    if data.streaming and (data.sample_documents < 2 or data.window_documents < 1):
        raise InputError(
            "a stream needs at least 2 sample_documents and 1 window_documents, got "
            f"{data.sample_documents} and {data.window_documents}."
        )
    check_trackers(recipe.tracker_list)
    check_model(recipe, num_processes)


def check_model(recipe: Recipe, num_processes: int = 1) -> None:
    """`check_recipe` for a recipe that need not name its text yet."""
    check_seed(recipe.seed)
    check_ranges(recipe)
    check_block_size(recipe.data.context, recipe.chunk_size)
    # Held-out text is scored in windows of this many tokens.
    check_block_size(recipe.data.context, window_of(recipe.chunk_size))
    if recipe.chunk_size < NUM_ORDERS and recipe.language_model.attention.startswith("flash"):
        raise InputError(
            f"{recipe.language_model.attention} does not support the attention mask needed to score chunks "
            f"of fewer than {NUM_ORDERS} tokens; set language_model.attention to sdpa."
        )
    check_chunk_size(recipe)
    _check_network(recipe)
    stages = {"language_model": recipe.language_model.training}
    if recipe.trains_autoencoder:
        stages["autoencoder"] = recipe.autoencoder.training
    for name, training in stages.items():
        check_training(training, f"{name}.training", recipe.data.context, num_processes)
    check_attention(recipe.language_model)


def check_finetuning_recipe(recipe: FinetuningRecipe, num_processes: int = 1) -> None:
    """Check a fine-tuning recipe, as far as this is possible without its model.

    Raises:
        InputError: If it names no model or examples, or a setting is out of range.
    """
    check_types(recipe)
    if not recipe.model:
        raise InputError("the recipe names no model; pass --model FOLDER.")
    if not recipe.examples.sources:
        raise InputError("the recipe names no examples; pass --examples.sources FILE.")
    check_seed(recipe.seed)
    check_ranges(recipe)
    check_training(recipe.training, "training", recipe.examples.context, num_processes)
    check_thoughts(recipe)
    check_trackers(recipe.tracker_list)


def check_thoughts(recipe: FinetuningRecipe) -> None:
    """Raise InputError if the stages do not fit in the training steps, or settings rule out thoughts."""
    if recipe.thoughts.mode == "none":
        return
    settings = recipe.thoughts
    Curriculum.of(settings, recipe.training.steps)
    NUM_THOUGHTS.require("thoughts.stages times thoughts.per_step", settings.stages * settings.per_step)
    if settings.mode == "drop" and settings.supervised:
        raise InputError("thoughts.mode drop leaves nothing to supervise: set thoughts.supervised to false.")
    if settings.mode != "state" and settings.scale != "none":
        raise InputError(f"thoughts.scale is for thoughts.mode state, not {settings.mode}: set it to none.")
    for name in ("gradient_checkpointing", "compile"):
        if recipe.thoughts.mode == "state" and getattr(recipe.training, name):
            raise InputError(
                f"training.{name} does not work with thoughts, each of which takes its own forward pass: set "
                "it to false."
            )


def check_training(training: TrainingSettings, name: str, context: int, num_processes: int) -> None:
    """Check the training settings of a stage, and whether this machine supports them.

    Arguments and errors are those of `check_steps`.
    """
    check_steps(training, name, context, num_processes)
    check_compiler(training, name)


def check_steps(training: TrainingSettings, name: str, context: int, num_processes: int) -> None:
    """Check the training settings of a stage, independently of the machine.

    Args:
        training: The settings.
        name: Their dotted name, for messages.
        context: Tokens per block.
        num_processes: Processes that share each step.

    Raises:
        InputError: If a value is out of range, or the optimizer is unknown or does not accept its settings.
    """
    check_optimizer(training.optimizer)
    _warn_of_muon_rate(training.optimizer, name)
    try:
        training.batches(context, num_processes)
    except InputError as error:
        raise InputError(f"{name}.{error}") from error


def _warn_of_muon_rate(settings: OptimizerSettings, name: str) -> None:
    """Warn if AdamW has Muon's learning rate: choosing another optimizer alone keeps the recipe's rate."""
    if settings.name == "adamw" and settings.learning_rate > _HIGHEST_ADAMW_RATE:
        logger.warning(
            "%s.optimizer is adamw with a learning rate of %g, which suits muon; recipes with adamw have "
            "3e-4 to 5e-4.",
            name,
            settings.learning_rate,
        )


def check_chunk_size(recipe: Recipe) -> None:
    """Raise InputError if an autoregressive model has chunks of several tokens."""
    if recipe.model == "autoregressive" and recipe.chunk_size != 1:
        raise InputError(
            f"an autoregressive model predicts single tokens: set chunk_size to 1, not {recipe.chunk_size}."
        )


def check_seed(seed: int) -> None:
    """Raise InputError unless all random generators accept a seed."""
    if not 0 <= seed < 2**32:
        raise InputError(f"the seed must lie between 0 and {2**32 - 1}, got {seed}.")


def _check_network(recipe: Recipe) -> None:
    """Build the network of a recipe on the meta device, which takes no memory, to see if it can be built."""
    config = model_config(recipe, vocab_size=1)
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        check_memory(network)
    except InputError:
        raise
    except Exception as error:  # Third-party heads may raise anything.
        raise InputError(f"the recipe does not define a valid model: {reason_of(error)}") from error
    check_teacher(recipe, network)
