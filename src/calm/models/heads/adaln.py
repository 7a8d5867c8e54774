"""The network of the heads that take several steps: a residual MLP whose norms time and hidden state shift
and scale (adaptive layer norm; paper section 3.2).

Shapes: N draws, P positions, D hidden size, Z latent size, F time frequencies.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.models.blocks import ZeroLinear

_LONGEST_PERIOD = 10000.0


class _TimeEmbedding(nn.Module):
    """Sines and cosines of a time -> a vector."""

    def __init__(self, frequency_size: int, size: int) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.inp = nn.Linear(frequency_size, size)
        self.out = nn.Linear(size, size)

    def forward(self, time: Tensor) -> Tensor:
        half = self.frequency_size // 2
        exponents = torch.arange(half, device=time.device, dtype=torch.float32) / half
        angles = time.float().unsqueeze(-1) * torch.exp(-math.log(_LONGEST_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.out(F.silu(self.inp(waves.to(self.inp.weight.dtype))))


class _Block(nn.Module):
    """x + gate * mlp(scaled and shifted norm of x); it starts as the identity."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=eps)
        self.up = nn.Linear(size, size)
        self.down = nn.Linear(size, size)
        self.modulation = ZeroLinear(size, 3 * size)

    def forward(self, x_NPD: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        normed_NPD = self.norm(x_NPD) * (1 + scale) + shift
        return x_NPD + gate * self.down(F.silu(self.up(normed_NPD)))


class AdaptiveNetwork(nn.Module):
    """Points on the way from noise to latents, their times, and a condition -> one vector for each point.

    Args:
        latent_size: Dimensions Z of a point.
        out_size: Dimensions of what is predicted.
        hidden_size: Width D, that of the condition too.
        num_blocks: Residual blocks.
        frequency_size: Sines and cosines F of a time.
        eps: Epsilon of the norms.
        num_times: Times that each point has.
    """

    def __init__(
        self,
        latent_size: int,
        out_size: int,
        hidden_size: int,
        num_blocks: int,
        frequency_size: int,
        eps: float,
        num_times: int = 1,
    ) -> None:
        super().__init__()
        self.times = nn.ModuleList(_TimeEmbedding(frequency_size, hidden_size) for _ in range(num_times))
        self.condition_in = nn.Linear(hidden_size, hidden_size)
        self.inp = nn.Linear(latent_size, hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size, eps) for _ in range(num_blocks))
        self.out_norm = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=False)
        self.out_modulation = ZeroLinear(hidden_size, 2 * hidden_size)
        self.out = ZeroLinear(hidden_size, out_size)

    def forward(self, x_NPZ: Tensor, times: tuple[Tensor, ...], condition_PD: Tensor) -> Tensor:
        """What is predicted at every point, (N, P, out).

        Args:
            x_NPZ: Points.
            times: Of each point, (N, P), or one for all, (); in the latter case what time and condition
                make of the norms is computed once for all draws of a position.
            condition_PD: What `condition_in` makes of the hidden states.
        """
        dtype = self.inp.weight.dtype
        embedded = sum(embed(time) for embed, time in zip(self.times, times, strict=True))
        condition = F.silu(embedded + condition_PD)
        hidden_NPD = self.inp(x_NPZ.to(dtype))
        for block in self.blocks:
            hidden_NPD = block(hidden_NPD, condition)
        shift, scale = self.out_modulation(condition).chunk(2, dim=-1)
        # Points stay in float32 whatever the weights are: many small steps are added up.
        return self.out(self.out_norm(hidden_NPD) * (1 + scale) + shift).float()

    def boundary_layers(self) -> list[nn.Module]:
        """Layers that meet latents or times, which Muon leaves to AdamW."""
        return [self.inp, self.out, *(cast(_TimeEmbedding, embed).inp for embed in self.times)]


def adaptive_multiply_adds(
    latent_size: int,
    out_size: int,
    hidden_size: int,
    num_blocks: int,
    frequency_size: int,
    num_times: int = 1,
) -> tuple[int, int, int, int]:
    """Multiply-adds of the network: for a hidden state, for a time, for both together, for a point."""
    square = hidden_size * hidden_size
    return (
        square,
        num_times * (frequency_size * hidden_size + square),
        3 * num_blocks * square + 2 * square,
        (latent_size + out_size) * hidden_size + 2 * num_blocks * square,
    )


def check_frequencies(frequency_size: int) -> None:
    """Raise ValueError unless there are as many sines as cosines."""
    if frequency_size < 2 or frequency_size % 2:
        raise ValueError(f"frequency_size must be even and at least 2, got {frequency_size}.")
