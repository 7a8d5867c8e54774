"""Optimizers by name: Muon for weight matrices with AdamW for the rest, AdamW, or any other."""

from typing import Any

import pytorch_optimizer
import torch
from pytorch_optimizer import Muon
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, get_scheduler

from calm.errors import InputError, reason_of
from calm.models.heads import GenerativeHead
from calm.training.recipe import OptimizerSettings


class MuonWithAdamW(Muon):
    """`pytorch_optimizer.Muon` that orthogonalises in float32 on a CPU.

    The library, like torch.optim.Muon, always uses bfloat16; a CPU without bfloat16 instructions
    multiplies such matrices about 80 times slower than float32 ones.
    """

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        sharded = [update for update in updates if isinstance(update, DTensor)]
        if sharded:  # Each process does the work for whole matrices.
            whole = MuonWithAdamW._orthogonalize(group, [update.full_tensor() for update in sharded])
            return [
                distribute_tensor(matrix, update.device_mesh, update.placements, src_data_rank=None)
                for matrix, update in zip(whole, sharded, strict=True)
            ]
        dtype = torch.bfloat16 if updates[0].is_cuda else torch.float32
        result = zero_power_via_newton_schulz_5(
            torch.stack(updates), num_steps=group["ns_steps"], weights=group["ns_coeffs"], dtype=dtype
        )
        return list(result.unbind())


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the parameters that are trained.

    Raises:
        InputError: If the name is unknown.
    """
    optimizer_class = find_optimizer(settings.name)
    if optimizer_class is MuonWithAdamW:
        return _muon(model, settings)
    groups, rate = _decayed_and_not(model, settings.weight_decay), settings.learning_rate
    if optimizer_class is torch.optim.AdamW:
        betas = (settings.beta1, settings.beta2)
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=settings.epsilon, fused=True)
    build: Any = optimizer_class  # Each class has arguments of its own.
    return build(groups, lr=rate, **settings.extra)


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raise InputError if the optimizer of a recipe is unknown, or does not take its settings."""
    try:
        build_optimizer(nn.Linear(2, 2), settings)
    except InputError:
        raise
    except Exception as error:  # Each class has its own ways to refuse.
        raise InputError(
            f"the optimizer '{settings.name}' does not take its settings ({reason_of(error)})."
        ) from error


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class that a recipe names.

    Raises:
        InputError: If the name is unknown.
    """
    if name in ("muon", "adamw"):
        return {"muon": MuonWithAdamW, "adamw": torch.optim.AdamW}[name]
    try:
        return pytorch_optimizer.load_optimizer(name)
    except (NotImplementedError, ValueError, ImportError) as error:
        raise InputError(
            f"there is no optimizer '{name}'; use muon, adamw or a name of pytorch_optimizer."
        ) from error


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: OptimizerSettings, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule of a recipe."""
    warmup = min(settings.warmup_steps, steps)
    if settings.schedule == "warmup_stable_decay":
        decay = min(round(settings.decay_fraction * steps), steps - warmup)
        extra = {"num_decay_steps": decay, "decay_type": "linear"}
        return get_scheduler("warmup_stable_decay", optimizer, warmup, steps, extra)
    name = {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule)
    return get_scheduler(name, optimizer, warmup, steps)


def _muon(model: nn.Module, settings: OptimizerSettings) -> MuonWithAdamW:
    """Muon where a matrix maps features to features; AdamW where rows or columns are symbols.

    AdamW's part: embeddings of tokens, in and out, biases and norms, and of a head the layers that meet
    noise or latents.
    """
    unsuited = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    scores = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if scores is not None:
        unsuited |= {id(p) for p in scores.parameters()}
    for module in model.modules():
        if isinstance(module, GenerativeHead):
            unsuited |= {id(p) for part in module.boundary_layers() for p in part.parameters()}
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and id(parameter) not in unsuited
            (matrices if is_matrix else rest).append(parameter)
    return MuonWithAdamW(
        [
            {
                "params": matrices,
                "use_muon": True,
                "lr": settings.learning_rate,
                "momentum": settings.momentum,
                "weight_decay": settings.weight_decay,
                "ns_steps": settings.newton_schulz_steps,
            },
            {
                "params": rest,
                "use_muon": False,
                "lr": settings.adamw_learning_rate,
                "betas": (settings.beta1, settings.beta2),
                "eps": settings.epsilon,
                "weight_decay": 0.0,
            },
        ]
    )


def _decayed_and_not(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
