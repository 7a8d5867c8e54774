"""A stage of training, and its arguments for the Hugging Face Trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from calm.training.processes import processes
from calm.training.recipe import TrainingSettings
from calm.training.sharding import shard_on_cpu_as_well, sharding_arguments
from calm.training.teacher import Teacher
from calm.training.trackers import Tracking

Score = Callable[[PreTrainedModel, datasets.Dataset], dict[str, float]]
"""Scores of a network on held-out blocks, by name."""


@dataclass(frozen=True)
class Hooks:
    """What a user adds to the training of a model.

    Args:
        callbacks: Callbacks of transformers' Trainer. They see the model while it trains, but their own state
            is not part of a checkpoint.
        scores: Functions that take the model and the held-out blocks at each evaluation, and return scores by
            name. They are logged and recorded beside the package's own.
    """

    callbacks: Sequence[TrainerCallback] = ()
    scores: Sequence[Score] = ()


@dataclass(frozen=True)
class TrainingStage:
    """How a network is trained, and where its checkpoints go.

    Args:
        name: What is trained, for messages.
        settings: The stage's part of a recipe.
        folder: Folder of checkpoints and logs.
        seed: Seed of data order and training noise.
        is_sharded: Whether each of several processes keeps only a part of the network.
        is_last: Whether it is the run's last stage, which more steps extend.
        tracking: Its experiment trackers.
        teacher: The teacher, if there is one.
        hooks: What the user adds.
    """

    name: str
    settings: TrainingSettings
    folder: Path
    seed: int
    is_sharded: bool = False
    is_last: bool = False
    tracking: Tracking = field(default_factory=Tracking)
    teacher: Teacher | None = None
    hooks: Hooks = Hooks()


class RecipeArguments(TrainingArguments):
    """Arguments of the Trainer that also log the recipe to trackers."""

    recipe: Mapping[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """The arguments and the recipe, which trackers log as a run's configuration."""
        return {**super().to_dict(), "recipe": self.recipe}


def training_arguments(
    stage: TrainingStage, context: int, model: PreTrainedModel, *, is_stream: bool
) -> TrainingArguments:
    """The arguments of the Trainer for a stage.

    Args:
        stage: The stage.
        context: Tokens per block.
        model: The network.
        is_stream: Whether blocks come from a stream.

    Raises:
        InputError: If a step is not a whole number of blocks for each process.
    """
    settings, steps = stage.settings, stage.settings.steps
    blocks, accumulation = settings.batches(context, processes().num_processes)
    arguments = RecipeArguments(
        output_dir=str(stage.folder),
        max_steps=steps,
        per_device_train_batch_size=blocks,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=settings.optimizer.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=settings.precision == "bf16",
        torch_compile=settings.compile,
        ignore_data_skip=is_stream,  # A stream restores its own position.
        ddp_find_unused_parameters=False,  # Every trained weight contributes to every loss.
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.evaluate_every else "no",
        eval_steps=settings.evaluate_every or None,
        save_strategy="steps",
        save_steps=min(settings.save_every or steps, steps),
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=False,  # Otherwise it depends on the log level.
        seed=stage.seed,
        **stage.tracking.arguments(),
        **(sharding_arguments(model) if stage.is_sharded else {}),
    )
    arguments.recipe = stage.tracking.recipe
    if stage.is_sharded:
        shard_on_cpu_as_well()
    if arguments.n_gpu > 1:  # No launcher. DataParallel would split the noise and multiply the step.
        arguments._n_gpu = 1
    return arguments
