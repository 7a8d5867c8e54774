"""A recipe -> a model folder: prepare the text, train the autoencoder, then the language model.

An autoregressive model has no autoencoder; the rest is the same.

    output/
      recipe.yaml            the resolved recipe
      inputs.json            digests of what the run began with
      data/                  the prepared text (unless the recipe names a prepared folder)
      autoencoder/           the trained autoencoder
      model/                 the result: a self-contained model folder
      checkpoints/<stage>/   checkpoints and TensorBoard logs of each stage
      history.json           logged losses and held-out scores of both stages

A finished stage is recognised by its folder, so a run that was killed goes on where it stopped.
"""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from calm.data.prepared import PreparedData, split_of
from calm.data.streaming import BlockStream, Position, StreamSettings
from calm.errors import InputError
from calm.evaluation.held_out import score_brier, score_perplexity, score_reconstruction
from calm.evaluation.scorers import scorer_of
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.models.language_model import language_model
from calm.models.loading import load_autoencoder
from calm.storage.checksums import check_as_written
from calm.storage.disk import disk_errors, read_json, write_file_whole
from calm.storage.folders import written_whole
from calm.training.configurations import (
    autoencoder_config,
    autoregressive_config,
    language_model_config,
    special_tokens_of,
)
from calm.training.inputs import check_inputs, digest_of_weights
from calm.training.opening import (
    check_vocabulary,
    data_folder,
    open_run,
    reading_options,
    trained_autoencoder,
)
from calm.training.processes import processes
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.recipe_files import RECIPE, write_recipe
from calm.training.trainer import ChunkTrainer, Score

logger = logging.getLogger(__name__)
HISTORY = "history.json"


def train(recipe: Recipe, output: Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Run all stages of a recipe that are not finished yet.

    Args:
        recipe: The recipe.
        output: Folder of the run; see the layout at the top of this file.
        resume: Whether to go on with a run in that folder.
        overwrite: Whether to remove what is in that folder first.

    Returns:
        The model folder.

    Raises:
        InputError: If a setting or the folder does not fit.
    """
    with (
        disk_errors(output, "with room on the disk, --resume goes on from what was finished"),
        open_run(recipe, output, resume=resume, overwrite=overwrite) as data,
    ):
        if recipe.model == "calm":
            _finish_autoencoder(recipe, data, output)
        if not _is_finished(output / "model"):
            model = _new_language_model(recipe, data, output)
            model = _train_language_model(model, recipe, data, output)
            _finish(model, data.tokenizer, output / "model", recipe)
    return output / "model"


def train_autoencoder(recipe: Recipe, output: Path, *, resume: bool = False) -> Path:
    """Run a recipe up to its autoencoder; `train` with `resume` would go on from there.

    Returns:
        The autoencoder's folder.

    Raises:
        InputError: If a setting or the folder does not fit.
    """
    with open_run(recipe, output, resume=resume, overwrite=False) as data:
        _finish_autoencoder(recipe, data, output)
    return output / "autoencoder"


def _training_blocks(
    recipe: Recipe, data: PreparedData, num_workers: int, output: Path
) -> datasets.Dataset | BlockStream:
    settings = recipe.data
    if not settings.streaming:
        return _blocks(recipe, data, "train", recipe.chunk_size)
    everyone = processes()
    split = split_of(data_folder(recipe, output))
    stream = StreamSettings(
        sources=settings.source_list,
        options=reading_options(settings),
        chunk_size=recipe.chunk_size,
        block_size=settings.context,
        layout=settings.layout,
        seed=recipe.seed,
        window=settings.window_documents,
        held_out_below=split.highest,
        held_out_seed=split.seed,
        part_bytes=split.part_bytes,
    )
    position = Position(everyone.num_processes, max(1, num_workers))
    return BlockStream(stream, data.tokenizer, position, everyone.process_index)


def _blocks(recipe: Recipe, data: PreparedData, split: str, chunk_size: int) -> datasets.Dataset:
    with processes().main_process_first():  # It fills the cache.
        return data.blocks(
            split,
            chunk_size=chunk_size,
            block_size=recipe.data.context,
            layout=recipe.data.layout,
            seed=recipe.seed,
        )


def _is_finished(folder: Path) -> bool:
    """Whether a stage has left its folder; the same answer for all processes."""
    is_finished = (folder / "config.json").is_file()
    if is_finished and processes().is_main_process:
        check_as_written(folder)
    processes().wait_for_everyone()  # Else a quick one could write it before a slow one looks.
    return is_finished


def _finish_autoencoder(recipe: Recipe, data: PreparedData, output: Path) -> None:
    folder = output / "autoencoder"
    if not _is_finished(folder):
        _finish(_train_autoencoder(recipe, data, output), data.tokenizer, folder, recipe)
    if processes().is_main_process:
        check_inputs(output, {"its autoencoder": digest_of_weights(load_autoencoder(folder))})


def _train_autoencoder(recipe: Recipe, data: PreparedData, output: Path) -> CalmAutoencoder:
    settings = recipe.autoencoder
    if (trained := trained_autoencoder(recipe)) is not None:
        check_vocabulary(trained.config, recipe, data)
        return trained
    set_seed(recipe.seed)
    special = special_tokens_of(data.tokenizer)
    autoencoder = CalmAutoencoder(autoencoder_config(recipe, data.vocab_size, special))
    if autoencoder.config.has_codes:
        return autoencoder

    def score(model: PreTrainedModel, held_out: datasets.Dataset) -> dict[str, float]:
        assert isinstance(model, CalmAutoencoder)
        return score_reconstruction(model, held_out, settings.training.evaluation_blocks).as_metrics()

    held_out = _blocks(recipe, data, "validation", recipe.chunk_size)
    whole = _run_stage("autoencoder", autoencoder, recipe, data, held_out, score, settings.training, output)
    assert isinstance(whole, CalmAutoencoder)
    return whole


def _new_language_model(recipe: Recipe, data: PreparedData, output: Path) -> PreTrainedModel:
    """The language model of a recipe before training, with its trained autoencoder inside."""
    set_seed(recipe.seed)
    special = special_tokens_of(data.tokenizer)
    if recipe.model == "autoregressive":
        baseline = LlamaForCausalLM(autoregressive_config(recipe, data.vocab_size, special))
        spread = recipe.language_model.embedding_initializer_range / baseline.config.initializer_range
        with torch.no_grad():
            baseline.model.embed_tokens.weight *= spread
        return baseline
    autoencoder = load_autoencoder(output / "autoencoder")
    model = CalmForCausalLM(language_model_config(recipe, autoencoder.config, special))
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    model.head.init_from_counts(lambda: torch.from_numpy(data.token_counts()))
    return model


def _train_language_model(
    model: PreTrainedModel, recipe: Recipe, data: PreparedData, output: Path
) -> PreTrainedModel:
    settings = recipe.language_model.training
    held_out = _blocks(recipe, data, "validation", scorer_of(model).chunk_size)

    def score(model: PreTrainedModel, held_out: datasets.Dataset) -> dict[str, float]:
        metrics = score_brier(model, held_out, settings.evaluation_blocks).as_metrics()
        if language_model(model).has_likelihood:
            metrics["cross_entropy"] = score_perplexity(
                model, held_out, settings.evaluation_blocks
            ).cross_entropy
        return metrics

    whole = _run_stage("language_model", model, recipe, data, held_out, score, settings, output)
    whole.config.use_cache = True  # The Trainer turns it off, and it would stay so in the folder.
    return whole


def _run_stage(
    name: str,
    model: PreTrainedModel,
    recipe: Recipe,
    data: PreparedData,
    held_out: datasets.Dataset,
    score: Score,
    settings: TrainingSettings,
    output: Path,
) -> PreTrainedModel:
    """Train a model; it, or a copy of it with all weights where processes share them."""
    trainer = ChunkTrainer(
        model,
        _training_blocks(recipe, data, settings.num_workers, output),
        held_out,
        score,
        settings,
        output / "checkpoints" / name,
        data.tokenizer,
        recipe.data.context,
        recipe.seed,
        sharded=name == "language_model" and recipe.language_model.sharded,
    )
    trainer.train_or_resume()
    if processes().is_main_process:
        path = output / HISTORY
        history = _history_in(path)
        history[name] = trainer.state.log_history
        write_file_whole(path, json.dumps(history, indent=1) + "\n")
    return trainer.whole_network()


def _history_in(path: Path) -> dict[str, Any]:
    """What was logged so far; if that is damaged it is set aside, for no weights depend on it."""
    try:
        return read_json(path, dict) if path.exists() else {}
    except InputError as error:
        aside = path.with_name(f"damaged-{path.name}")
        path.replace(aside)
        logger.warning("%s It is now '%s'; what was logged before is missing.", error, aside.name)
        return {}


def _finish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, recipe: Recipe) -> None:
    if processes().is_main_process:
        with written_whole(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            write_recipe(recipe, partial / RECIPE)
    processes().wait_for_everyone()
