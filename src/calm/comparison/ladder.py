"""A ladder of models trained with equal FLOPs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from calm.comparison.costs import affordable_steps, autoencoder_flops, language_model_flops
from calm.comparison.text import with_shared_text
from calm.core.brier import window_of
from calm.data.chunking import check_block_size
from calm.data.prepared import load_prepared
from calm.errors import InputError
from calm.progress import announce, track
from calm.training.check import check_model, check_recipe
from calm.training.continuing import with_inherited_parts
from calm.training.ranges import RANGES, check_ranges
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.recipe_files import RECIPE
from calm.training.stages import train

_SMALLEST_LATENT = 16


def train_ladder(
    recipe: Recipe, chunk_sizes: Sequence[int], output: Path, *, baseline: bool = True, budget: float = 1.0
) -> list[Path]:
    """Train a recipe at several chunk sizes, and the baseline, with equal training FLOPs.

    FLOPs include autoencoder and language model: the autoencoder trains as in the recipe, and the language
    model for as many steps as the remaining FLOPs allow. The baseline has no autoencoder, so it trains for
    more. The latent size grows with the chunk size, keeping the recipe's dimensions per token. An interrupted
    ladder resumes where it stopped.

    Args:
        recipe: The recipe; its own chunk size and steps set the budget. Without sources, it is trained on
            the embedded stories.
        chunk_sizes: Chunk sizes K.
        output: Folder of all runs.
        baseline: Whether to train the autoregressive model too.
        budget: Share of the recipe's FLOPs that each model gets.

    Returns:
        The folders of the runs.

    Raises:
        InputError: If a chunk size is out of range or does not fit the context, or if the budget does not
            cover an autoencoder.
    """
    if not chunk_sizes and not baseline:
        raise InputError("there is nothing to train: give chunk sizes, or leave out --no_baseline.")
    if recipe.model != "calm" or recipe.autoencoder.path is not None:
        raise InputError("a ladder needs a recipe for a CALM that trains its own autoencoder.")
    check_ranges(recipe)  # First, since what follows divides by its chunk size.
    for size in chunk_sizes:
        RANGES[Recipe]["chunk_size"].require("a chunk size", size)
        check_block_size(recipe.data.context, window_of(size))
        check_model(at_chunk_size(recipe, size))
    if not budget > 0:
        raise InputError(f"the budget must be above 0, got {budget:g}.")
    output = output.resolve()
    recipe = with_shared_text(with_inherited_parts(recipe), output)
    vocab_size = load_prepared(Path(recipe.data.source_list[0])).vocab_size
    flops = budget * (language_model_flops(recipe, vocab_size) + autoencoder_flops(recipe, vocab_size))
    rungs = {f"K{size}": at_chunk_size(recipe, size) for size in chunk_sizes}
    if baseline:
        rungs["baseline"] = dataclasses.replace(recipe, model="autoregressive", chunk_size=1)
    for name, rung in rungs.items():
        steps = affordable_steps(rung, vocab_size, flops)
        if steps < 1:
            raise InputError(f"a budget of {budget:g} is used up by the autoencoder of {name}; increase it.")
        rungs[name] = _with_training(rung, _stretched(rung.language_model.training, steps))
        check_recipe(rungs[name])
    for name, rung in track(rungs.items(), "ladder", "run", total=len(rungs), stays=True):
        announce(f"training {name}: {rung.language_model.training.steps:,} steps of the language model")
        train(rung, output / name, resume=(output / name / RECIPE).is_file())
    return [output / name for name in rungs]


def at_chunk_size(recipe: Recipe, chunk_size: int) -> Recipe:
    """The recipe at another chunk size, with the same latent dimensions per token, but at least 16 in all."""
    latent = max(_SMALLEST_LATENT, round(recipe.autoencoder.latent_size * chunk_size / recipe.chunk_size))
    autoencoder = dataclasses.replace(recipe.autoencoder, latent_size=latent)
    return dataclasses.replace(recipe, chunk_size=chunk_size, autoencoder=autoencoder)


def _with_training(recipe: Recipe, training: TrainingSettings) -> Recipe:
    return dataclasses.replace(
        recipe, language_model=dataclasses.replace(recipe.language_model, training=training)
    )


def _stretched(training: TrainingSettings, steps: int) -> TrainingSettings:
    """Change the number of steps, keeping the number of evaluations."""
    interval = training.evaluate_every * steps / training.steps
    return dataclasses.replace(
        training, steps=steps, evaluate_every=max(1, round(interval)) if interval else 0
    )
