"""Muon for weight matrices, with AdamW for the rest."""

from typing import Any

import torch
from pytorch_optimizer import Muon
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from calm.models.heads import GenerativeHead
from calm.training.recipe import OptimizerSettings


class MuonWithAdamW(Muon):
    """`pytorch_optimizer.Muon`, but with float32 orthogonalization on CPUs, and with fused AdamW.

    The library, like torch.optim.Muon, always uses bfloat16. A CPU without bfloat16 instructions multiplies
    such matrices about 80 times slower than float32; for others, call `orthogonalize_in_bf16`.
    """

    def orthogonalize_in_bf16(self) -> None:
        """Use bfloat16 on CPUs as well. This is part of the state, so a resumed run keeps it."""
        for group in self.param_groups:
            group["orthogonalizes_in_bf16"] = True

    def _step_foreach(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        state_dict: dict[str, list[Tensor]],
        *corrections: Any,
    ) -> None:
        if group["use_muon"]:
            super()._step_foreach(group, params, grads, state_dict, *corrections)
            return
        step = torch.tensor(group["step"] - 1.0, device=params[0].device)  # adamw increments it.
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            state_dict["exp_avg"],
            state_dict["exp_avg_sq"],
            max_exp_avg_sqs=[],
            state_steps=[step.clone() for _ in params],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=self.maximize,
        )

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        sharded = [update for update in updates if isinstance(update, DTensor)]
        if sharded:  # Each process orthogonalizes whole matrices.
            full = MuonWithAdamW._orthogonalize(group, [update.full_tensor() for update in sharded])
            return [
                distribute_tensor(matrix, update.device_mesh, update.placements, src_data_rank=None)
                for matrix, update in zip(full, sharded, strict=True)
            ]
        in_bf16 = updates[0].is_cuda or group.get("orthogonalizes_in_bf16", False)
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        result = zero_power_via_newton_schulz_5(
            torch.stack(updates), num_steps=group["ns_steps"], weights=group["ns_coeffs"], dtype=dtype
        )
        return list(result.unbind())


def muon_with_adamw(model: nn.Module, settings: OptimizerSettings) -> MuonWithAdamW:
    """Muon for matrices that map features to features, AdamW for everything else.

    AdamW gets token embeddings, the output layer, biases, norms, and the layers of a head that handle noise
    or latents.
    """
    excluded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    output_layer = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if output_layer is not None:
        excluded |= {id(p) for p in output_layer.parameters()}
    for module in model.modules():
        if isinstance(module, GenerativeHead):
            excluded |= {id(p) for layer in module.boundary_layers() for p in layer.parameters()}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and id(parameter) not in excluded
            (matrices if is_matrix else others).append(parameter)
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
                "params": others,
                "use_muon": False,
                "lr": settings.adamw_learning_rate,
                "betas": (settings.beta1, settings.beta2),
                "eps": settings.epsilon,
                "weight_decay": 0.0,
            },
        ]
    )
