"""A recipe -> a model folder: prepare the text, train the autoencoder, then the language model.

An autoregressive model has no autoencoder; the rest is the same.

    output/
      recipe.yaml            the resolved recipe
      inputs.json            digests of the run's inputs
      data/                  the prepared text (unless the recipe names a prepared folder)
      autoencoder/           the trained autoencoder
      model/                 the result: a self-contained model folder
      checkpoints/<stage>/   checkpoints of each stage
      teacher.json           name, size and FLOPs of the teacher, if there is one
      history.json           logged losses, held-out scores and times of both stages

A stage is finished when its model's folder exists, so a run that was killed resumes where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

import datasets
from transformers import PreTrainedModel, TrainerCallback

from calm.data.prepared import PreparedData
from calm.evaluation.held_out import score_brier, score_perplexity, score_reconstruction
from calm.evaluation.scorers import scorer_of
from calm.models.autoencoder import CalmAutoencoder
from calm.models.language_model import language_model
from calm.models.loading import load_autoencoder
from calm.training.arguments import Hooks, Score, TrainingStage
from calm.training.blocks import Blocks, blocks_of
from calm.training.build import language_model_of, new_autoencoder
from calm.training.continuing import with_inherited_parts
from calm.training.inputs import check_inputs, digest_of_weights
from calm.training.opening import check_vocabulary, open_run, trained_autoencoder
from calm.training.overview import log_overview
from calm.training.precision import with_precision
from calm.training.processes import processes
from calm.training.recipe import Recipe
from calm.training.runs import Run
from calm.training.teacher import teacher_facts, teacher_of
from calm.training.trackers import tracking_of
from calm.training.trainer import ChunkTrainer


def train(
    recipe: Recipe,
    output: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    scores: Sequence[Score] = (),
) -> Path:
    """Run the unfinished stages of a recipe.

    Args:
        recipe: The recipe.
        output: Folder of the run; see the layout at the top of this file.
        resume: Whether to resume the run in that folder.
        overwrite: Whether to replace the contents of that folder.
        callbacks: Callbacks of transformers' Trainer, for the language model.
        scores: Functions (model, held-out blocks) -> scores by name, which are logged and recorded beside the
            package's own at each evaluation of the language model.

    Returns:
        The model folder.

    Raises:
        InputError: If a setting or the folder is not valid.
        RunError: If the run cannot continue; see `ChunkTrainer.train_or_resume`.
    """
    recipe, output = with_inherited_parts(recipe), Path(output)
    run = Run(with_precision(recipe, output, resume), output, resume, overwrite)
    recipe = run.recipe
    with open_run(run) as data:
        log_overview(run, data)
        if recipe.model == "calm":
            _finish_autoencoder(run, data)
        if not run.has_model("model"):
            run.save_model(
                "model", _train_language_model(run, data, Hooks(callbacks, scores)), data.tokenizer
            )
    return output / "model"


def train_autoencoder(recipe: Recipe, output: Path, *, resume: bool = False) -> Path:
    """Run a recipe up to its autoencoder; `train` with `resume` continues from there.

    Returns:
        The autoencoder's folder.

    Raises:
        InputError: If a setting or the folder is not valid.
        RunError: If the run cannot continue; see `ChunkTrainer.train_or_resume`.
    """
    run = Run(with_precision(with_inherited_parts(recipe), output, resume), output, resume)
    with open_run(run) as data:
        _finish_autoencoder(run, data)
    return output / "autoencoder"


def _finish_autoencoder(run: Run[Recipe], data: PreparedData) -> None:
    if not run.has_model("autoencoder"):
        run.save_model("autoencoder", _train_autoencoder(run, data), data.tokenizer)
    if processes().is_main_process:
        autoencoder = load_autoencoder(run.folder / "autoencoder")
        check_inputs(run.folder, {"its autoencoder": digest_of_weights(autoencoder)})


def _train_autoencoder(run: Run[Recipe], data: PreparedData) -> PreTrainedModel:
    """The trained autoencoder that the recipe names, or else a new one; fixed codes need no training."""
    recipe, settings = run.recipe, run.recipe.autoencoder.training
    if (trained := trained_autoencoder(recipe)) is not None:
        check_vocabulary(trained.config, recipe, data)
        return trained
    autoencoder = new_autoencoder(recipe, data)
    if autoencoder.config.has_codes:
        return autoencoder

    def score(model: PreTrainedModel, held_out: datasets.Dataset) -> dict[str, float]:
        assert isinstance(model, CalmAutoencoder)
        return score_reconstruction(model, held_out, settings.evaluation_blocks).as_metrics()

    blocks = blocks_of(run, data, settings.num_workers, recipe.chunk_size)
    folder, tracking = run.folder / "checkpoints/autoencoder", tracking_of(run, "autoencoder")
    stage = TrainingStage("autoencoder", settings, folder, recipe.seed, tracking=tracking)
    return _run_stage(run, autoencoder, blocks, score, stage)


def _train_language_model(run: Run[Recipe], data: PreparedData, hooks: Hooks) -> PreTrainedModel:
    recipe, settings = run.recipe, run.recipe.language_model.training
    autoencoder = load_autoencoder(run.folder / "autoencoder") if recipe.model == "calm" else None
    model = language_model_of(recipe, data, autoencoder)
    if (teacher := teacher_of(recipe, data)) is not None and processes().is_main_process:
        teacher_facts(teacher, recipe.data.context).write(run.folder)

    def score(model: PreTrainedModel, held_out: datasets.Dataset) -> dict[str, float]:
        num_blocks = settings.evaluation_blocks
        metrics = score_brier(model, held_out, num_blocks).as_metrics()
        if language_model(model).has_likelihood:
            metrics["cross_entropy"] = score_perplexity(model, held_out, num_blocks).cross_entropy
        return metrics

    blocks = blocks_of(run, data, settings.num_workers, scorer_of(model).chunk_size)
    is_sharded = recipe.language_model.sharded and processes().num_processes > 1
    folder, tracking = run.folder / "checkpoints/language_model", tracking_of(run, "language_model")
    stage = TrainingStage(
        "language model",
        settings,
        folder,
        recipe.seed,
        is_sharded=is_sharded,
        is_last=True,
        tracking=tracking,
        teacher=teacher,
        hooks=hooks,
    )
    trained = _run_stage(run, model, blocks, score, stage)
    trained.config.use_cache = True  # The Trainer turns it off, and that would be saved.
    return trained


def _run_stage(
    run: Run[Recipe], model: PreTrainedModel, blocks: Blocks, score: Score, stage: TrainingStage
) -> PreTrainedModel:
    """Train a network and return it, or an unsharded copy if it is sharded."""
    trainer = ChunkTrainer(model, blocks, score, stage)
    trainer.train_or_resume()
    run.save_history(trainer.state.log_history, stage.folder.name)
    return trainer.unsharded_network()
