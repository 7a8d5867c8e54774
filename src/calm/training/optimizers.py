"""Optimizers and schedules by name.

An optimizer is a function (model, settings) -> torch.optim.Optimizer, registered under the name that recipes
give as `optimizer.name`. docs/recipes.md shows how to add one.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

import pytorch_optimizer
import torch
from torch import nn
from transformers import get_scheduler

from calm.errors import InputError, reason_of
from calm.models.uptraining import new_parameters
from calm.training.muon import MuonWithAdamW, muon_with_adamw
from calm.training.recipe import OptimizerSettings

OptimizerBuilder = Callable[[nn.Module, OptimizerSettings], torch.optim.Optimizer]
_BUILDERS: dict[str, OptimizerBuilder] = {}
_ENTRY_POINTS = "calm.optimizers"


def register_optimizer(name: str, build: OptimizerBuilder) -> None:
    """Register an optimizer under a name.

    An installed package can instead declare an entry point in the group "calm.optimizers": a module that
    calls this, which is imported when a recipe asks for an optimizer of the entry point's name.

    Args:
        name: The name in recipes.
        build: Builds the optimizer from the model and the settings, over the trained parameters.
    """
    _BUILDERS[name] = build


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, precision: str = "fp32"
) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the trained parameters.

    Args:
        model: The model.
        settings: The recipe's optimizer settings.
        precision: Precision of training, which Muon's orthogonalization uses as well.

    Raises:
        InputError: If the name is unknown.
    """
    if settings.name not in _BUILDERS:
        for entry_point in entry_points(group=_ENTRY_POINTS, name=settings.name):
            entry_point.load()
    optimizer = _BUILDERS.get(settings.name, _of_pytorch_optimizer)(model, settings)
    if settings.source_rate != 1:
        _scale_source_rates(optimizer, new_parameters(model), settings.source_rate)
    if precision == "bf16" and isinstance(optimizer, MuonWithAdamW):
        optimizer.orthogonalize_in_bf16()
    return optimizer


def _scale_source_rates(
    optimizer: torch.optim.Optimizer, new: Sequence[nn.Parameter], source_rate: float
) -> None:
    """Scale the learning rates of an uptrained model's source weights; other models have no new weights."""
    if not new:
        return
    new_ids, groups = {id(parameter) for parameter in new}, []
    for group in optimizer.param_groups:
        from_source = [p for p in group["params"] if id(p) not in new_ids]
        added = [p for p in group["params"] if id(p) in new_ids]
        for params, rate in ((from_source, source_rate), (added, 1.0)):
            if params:
                groups.append({**group, "params": params, "lr": rate * group["lr"]})
    optimizer.param_groups[:] = groups


class _StandIn(nn.Linear):
    """A small network to build optimizers for before there is a model."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise _NeedsModelError(str(error)) from error


class _NeedsModelError(AttributeError):
    """An optimizer asks for a part of a network that only a real model has, such as its head."""


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raise InputError if the optimizer of a recipe is unknown, or does not accept its settings.

    An optimizer that needs the real model cannot be checked before there is one.
    """
    try:
        build_optimizer(_StandIn(2, 2), settings)
    except InputError:
        raise
    except _NeedsModelError:
        return
    except Exception as error:  # Each class rejects settings in its own way.
        raise InputError(
            f"the optimizer '{settings.name}' does not accept its settings ({reason_of(error)})."
        ) from error


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and embeddings with weight decay, biases and norms without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        decay_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def _of_pytorch_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    try:
        build: Any = pytorch_optimizer.load_optimizer(settings.name)  # Each class has arguments of its own.
    except (NotImplementedError, ValueError, ImportError) as error:
        known = ", ".join(_BUILDERS)
        raise InputError(
            f"there is no optimizer '{settings.name}'; use {known} or the name of one in pytorch_optimizer."
        ) from error
    groups = decay_groups(model, settings.weight_decay)
    return build(groups, lr=settings.learning_rate, **settings.extra)


register_optimizer("muon", muon_with_adamw)
register_optimizer("adamw", _adamw)


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: OptimizerSettings, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule of a recipe."""
    warmup = min(settings.warmup_steps, steps)
    if settings.schedule == "warmup_stable_decay":
        decay = steps - last_step_at_peak(settings, steps)
        extra = {"num_decay_steps": decay, "decay_type": "linear"}
        return get_scheduler("warmup_stable_decay", optimizer, warmup, steps, extra)
    name = {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule)
    return get_scheduler(name, optimizer, warmup, steps)


def last_step_at_peak(settings: OptimizerSettings, steps: int) -> int:
    """The last step before the learning rate decays: until then, longer schedules have the same rates."""
    warmup = min(settings.warmup_steps, steps)
    if settings.schedule == "constant":
        return steps
    if settings.schedule == "warmup_stable_decay":
        return max(warmup, steps - round(settings.decay_fraction * steps))
    return warmup


def follow_schedule(optimizer: Any, schedule: Any) -> None:
    """Set the learning rates of an optimizer to those of a schedule at its current step.

    A checkpoint restores those of the schedule it was written under, which may have had fewer steps.
    """
    schedule = getattr(schedule, "scheduler", schedule)  # accelerate wraps it.
    pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, (rate, factor) in zip(optimizer.param_groups, pairs, strict=True):
        group["lr"] = rate * factor(schedule.last_epoch)
