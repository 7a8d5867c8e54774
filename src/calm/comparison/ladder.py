"""A ladder of models that are trained with equal operations, and what training a run took."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedConfig

from calm.core.brier import window_of
from calm.data.chunking import check_block_size
from calm.data.prepare import is_prepared, load_prepared, sources_of
from calm.data.stories import NUM_STORIES, write_stories
from calm.errors import InputError
from calm.flops import training_flops
from calm.report.measured import Checkpoint
from calm.training.configurations import autoencoder_config, check_recipe, model_config
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.recipe_files import read_recipe
from calm.training.stages import HISTORY, RECIPE, data_folder, train

_SMALLEST_LATENT = 16


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """What the training of a run took, and where it stood on the way.

    Args:
        flops: Operations, autoencoder included.
        seconds: Time of both stages, held-out evaluations included; of a stage that was stopped and
            resumed, the time since then.
        checkpoints: Where it stood at the evaluations of the language model.
    """

    flops: float
    seconds: float
    checkpoints: list[Checkpoint]


def train_ladder(
    recipe: Recipe, chunk_sizes: Sequence[int], output: Path, *, baseline: bool = True, budget: float = 1.0
) -> list[Path]:
    """Train a recipe at several chunk sizes, and the baseline, with equal training operations.

    Operations are those of autoencoder and language model together: the autoencoder trains as the recipe
    says, the language model for as many steps as the rest allows; the baseline, without autoencoder, for
    more. The latent grows with the chunk: as many dimensions per token as in the recipe. A ladder that
    was stopped goes on where it was.

    Args:
        recipe: The recipe; its own chunk size and steps set the budget. Without sources it is trained on
            the embedded stories.
        chunk_sizes: Chunk sizes K.
        output: Folder of all runs.
        baseline: Whether the autoregressive model is trained too.
        budget: Share of the recipe's operations that each model gets.

    Returns:
        The folders of the runs.

    Raises:
        InputError: If a chunk size does not fit the context, or the budget does not train an autoencoder.
    """
    if not chunk_sizes and not baseline:
        raise InputError("there is nothing to train: give chunk sizes, or leave out --no_baseline.")
    if recipe.model != "calm" or recipe.autoencoder.path is not None:
        raise InputError("a ladder takes a recipe of a CALM that trains its own autoencoder.")
    for size in chunk_sizes:
        check_block_size(recipe.data.context, window_of(size))
    output = output.resolve()  # Recipes name the text in it, from wherever they are read again.
    output.mkdir(parents=True, exist_ok=True)
    folder = _data_for(recipe, output)
    data = load_prepared(folder)
    config = model_config(recipe, data.vocab_size)
    operations = budget * (_training_flops(recipe, config) + _autoencoder_flops(recipe, data.vocab_size))
    source = dataclasses.replace(recipe.data, sources=[str(folder)])
    recipe = dataclasses.replace(recipe, data=source)
    rungs = {f"K{size}": _rung(recipe, size) for size in chunk_sizes}
    if baseline:
        rungs["baseline"] = dataclasses.replace(recipe, model="autoregressive", chunk_size=1)
    for name, rung in rungs.items():
        one_step = dataclasses.replace(rung.language_model.training, steps=1)
        per_step = _training_flops(_with_training(rung, one_step), model_config(rung, data.vocab_size))
        steps = round((operations - _autoencoder_flops(rung, data.vocab_size)) / per_step)
        if steps < 1:
            raise InputError(f"a budget of {budget:g} is spent by the autoencoder of {name}; give more.")
        rungs[name] = _with_training(rung, _stretched(rung.language_model.training, steps))
        check_recipe(rungs[name])
    for name, rung in rungs.items():
        steps = rung.language_model.training.steps
        Console(highlight=False).print(f"[bold]{name}[/bold]: {steps} steps of the language model")
        train(rung, output / name, resume=(output / name / RECIPE).is_file())
    return [output / name for name in rungs]


def record_of(run: Path, config: PreTrainedConfig) -> TrainingRecord | None:
    """What is known of a run's training; nothing for a mere model folder.

    Args:
        run: Folder of the run.
        config: Configuration of its language model.
    """
    if not (run / RECIPE).is_file() or not (run / HISTORY).is_file():
        return None
    recipe = read_recipe(str(run / RECIPE))
    history = json.loads((run / HISTORY).read_text(encoding="utf-8"))
    total = _training_flops(recipe, config)
    before = _autoencoder_flops(recipe, config.vocab_size)
    steps = recipe.language_model.training.steps
    return TrainingRecord(
        flops=before + total,
        seconds=sum(entry.get("train_runtime", 0.0) for stage in history.values() for entry in stage),
        checkpoints=[
            Checkpoint(
                before + total * entry["step"] / steps,
                entry["eval_brier_lm"],
                entry.get("eval_cross_entropy"),
            )
            for entry in history["language_model"]
            if "eval_brier_lm" in entry
        ],
    )


def _training_flops(recipe: Recipe, config: PreTrainedConfig) -> float:
    """Operations of the language model's training."""
    return training_flops(config, recipe.data.context) * _tokens(recipe, recipe.language_model.training)


def _autoencoder_flops(recipe: Recipe, vocab_size: int) -> float:
    if recipe.model == "autoregressive" or recipe.autoencoder.path is not None:
        return 0.0
    per_token = training_flops(autoencoder_config(recipe, vocab_size, {}), recipe.data.context)
    return per_token * _tokens(recipe, recipe.autoencoder.training)


def _tokens(recipe: Recipe, training: TrainingSettings) -> int:
    return training.steps * training.batch_size * training.gradient_accumulation * recipe.data.context


def _rung(recipe: Recipe, chunk_size: int) -> Recipe:
    """The recipe at another chunk size, with as many latent dimensions per token."""
    latent = max(_SMALLEST_LATENT, round(recipe.autoencoder.latent_size * chunk_size / recipe.chunk_size))
    autoencoder = dataclasses.replace(recipe.autoencoder, latent_size=latent)
    return dataclasses.replace(recipe, chunk_size=chunk_size, autoencoder=autoencoder)


def _with_training(recipe: Recipe, training: TrainingSettings) -> Recipe:
    return dataclasses.replace(
        recipe, language_model=dataclasses.replace(recipe.language_model, training=training)
    )


def _stretched(training: TrainingSettings, steps: int) -> TrainingSettings:
    """Another number of steps, evaluated as often."""
    every = training.evaluate_every * steps / training.steps
    return dataclasses.replace(training, steps=steps, evaluate_every=max(1, round(every)) if every else 0)


def _data_for(recipe: Recipe, output: Path) -> Path:
    """The text of a ladder, prepared once for all rungs."""
    if not recipe.data.source_list:
        stories = output / "stories.jsonl"
        if not is_prepared(output / "data"):
            write_stories(stories, recipe.seed, NUM_STORIES)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=[str(stories)]))
    folder = data_folder(recipe, output)
    if folder == output / "data" and sources_of(folder) != recipe.data.source_list:
        raise InputError(
            f"'{folder}' was prepared from other sources than the recipe's; choose another --output."
        )
    return folder
