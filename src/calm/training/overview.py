"""What a run is about to do, logged before it starts: sizes, tokens, FLOPs, and how long it should take."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from calm.data.prepared import PreparedData
from calm.hardware import device_name, fast_float32, width_of
from calm.quantities import duration, short
from calm.training.build import new_autoencoder, untrained_language_model
from calm.training.checkpoints import checkpoints_in, step_of
from calm.training.continuing import log_initial_model
from calm.training.optimizers import build_optimizer
from calm.training.processes import processes
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.runs import Run
from calm.training.speed import known_training_flops
from calm.training.teacher import Teacher, teacher_facts, teacher_of

logger = logging.getLogger(__name__)
_TIMED_STEPS = 2  # The first is a warm-up.


@dataclass(frozen=True)
class Forecast:
    """What a stage of a run is about to do.

    Args:
        name: What is trained.
        parameters: Number of trained parameters.
        steps: Optimizer steps, including those already done.
        steps_done: Those that an earlier part of the run has done.
        tokens: Tokens of all steps.
        epochs: Passes over the text; None for a stream.
        flops: Training FLOPs of all steps; None if unknown.
        seconds: Estimated time of the remaining steps, without evaluations; None if not measured.
        teacher: The teacher, in words; None if there is none.
    """

    name: str
    parameters: int
    steps: int
    steps_done: int
    tokens: int
    epochs: float | None
    flops: float | None
    seconds: float | None
    teacher: str | None = None

    def __str__(self) -> str:
        parts = [
            f"{short(self.parameters)} parameters",
            f"{self.steps:,} steps of {self.tokens // self.steps:,} tokens, {short(self.tokens)} in all",
        ]
        if self.epochs is not None:
            parts[-1] += f" ({self.epochs:.2g} epochs)"
        if self.teacher is not None:
            parts.append(f"learning from {self.teacher}")
        if self.flops is not None:
            parts.append(f"{self.flops:.1e} FLOPs")
        if self.seconds is not None:
            remaining = f" for the {self.steps - self.steps_done:,} steps left" if self.steps_done else ""
            parts.append(f"about {duration(self.seconds)}{remaining}")
        return f"{self.name}: {'; '.join(parts)}"


def log_overview(run: Run[Recipe], data: PreparedData) -> None:
    """Log what a run is about to do, if INFO is logged: two steps of each stage are run to time them."""
    if not processes().is_main_process or not logger.isEnabledFor(logging.INFO):
        return
    precision = run.recipe.language_model.training.precision
    number = processes().num_processes
    devices = f"{number} processes, each on {device_name()}" if number > 1 else device_name()
    forecasts = list(forecasts_of(run, data))
    if not forecasts:
        return
    log_initial_model(run.recipe)
    for forecast in forecasts:
        logger.info("%s", forecast)
    times = [forecast.seconds for forecast in forecasts]
    total = sum(seconds for seconds in times if seconds is not None)
    estimate = "" if None in times else f"; training should take about {duration(total)}"
    logger.info("on %s, in %s%s", devices, precision, estimate)


def forecasts_of(run: Run[Recipe], data: PreparedData) -> Iterator[Forecast]:
    """What each unfinished stage is about to do. torch's random states are left as they were."""
    recipe = run.recipe
    with torch.random.fork_rng():
        if recipe.trains_autoencoder and not run.is_finished("autoencoder"):
            autoencoder = new_autoencoder(recipe, data)
            yield _forecast(run, data, "autoencoder", autoencoder, recipe.autoencoder.training)
        if run.is_finished("model"):
            return
        model, teacher = untrained_language_model(recipe, data), teacher_of(recipe, data)
        yield _forecast(run, data, "language model", model, recipe.language_model.training, teacher)


def _forecast(
    run: Run[Recipe],
    data: PreparedData,
    name: str,
    network: PreTrainedModel,
    training: TrainingSettings,
    teacher: Teacher | None = None,
) -> Forecast:
    recipe, tokens = run.recipe, training.tokens
    checkpoints = checkpoints_in(run.folder / "checkpoints" / name.replace(" ", "_"))
    steps_done = step_of(checkpoints[-1]) if checkpoints else 0
    text_tokens = data.counts().tokens["train"]
    flops = known_training_flops(network.config, recipe.data.context, teacher)
    parameters = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    is_sharded = recipe.language_model.sharded
    seconds = None if is_sharded else seconds_per_step(network, training, recipe.data.context, teacher)
    return Forecast(
        name=name,
        parameters=parameters,
        steps=training.steps,
        steps_done=steps_done,
        tokens=tokens,
        epochs=None if recipe.data.streaming else tokens / max(1, text_tokens),
        flops=None if flops is None else flops * tokens,
        seconds=None if seconds is None else seconds * (training.steps - steps_done),
        teacher=None if teacher is None else str(teacher_facts(teacher, recipe.data.context)),
    )


def seconds_per_step(
    network: PreTrainedModel, training: TrainingSettings, context: int, teacher: Teacher | None = None
) -> float | None:
    """Seconds per optimizer step on this device, measured on random tokens; None if out of memory.

    Args:
        network: The network; its weights are changed.
        training: How it is trained.
        context: Tokens per block.
        teacher: Its teacher, if there is one.
    """
    blocks, accumulation = training.batches(context, processes().num_processes)
    device = processes().device
    try:
        nn.Module.to(network, device).train()
        if teacher is not None:
            nn.Module.to(teacher.network, device)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(network.config.vocab_size, (blocks, context), generator=generator).to(device)
        if training.gradient_checkpointing:
            network.gradient_checkpointing_enable()
        optimizer = build_optimizer(network, training.optimizer, training.precision)
        is_bf16 = training.precision == "bf16"

        def backward() -> None:
            teacher_output = {} if teacher is None else {"teacher_output": teacher.output(tokens, tokens)}
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                network(input_ids=tokens, labels=tokens, **teacher_output).loss.backward()

        with fast_float32(device, width_of(network.config)):  # As the Trainer does.
            seconds = accumulation * _seconds_of(backward, device) + _seconds_of(optimizer.step, device)
    except torch.OutOfMemoryError:
        return None  # Training will report it.
    return seconds


def _seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the last of a few calls."""
    for _ in range(_TIMED_STEPS):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return time.perf_counter() - start
