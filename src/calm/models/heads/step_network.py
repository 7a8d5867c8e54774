"""The network of the multi-step heads, and their base class.

The network is a residual MLP whose norms are shifted and scaled by time and hidden state (adaptive layer
norm; paper section 3.2).

Shapes: N draws, P positions, D hidden size, Z latent size.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.core.random import Randomness, normal
from calm.models.blocks import AdaptiveBlock, RecomputedBlock, ZeroLinear
from calm.models.heads.contract import LatentHead
from calm.models.heads.fields import HeadConfig, HeadFlops, check_counts

UNITS_OF_TIME = 1000
"""The time from noise to data, in the units of the network's time embedding."""
_LONGEST_PERIOD = 10000.0


@dataclass(kw_only=True)
class StepHeadConfig(HeadConfig):
    """Fields of every multi-step head.

    Args:
        num_blocks: Residual blocks.
        num_draws: Targets N per position in the loss, each with its own time and noise.
        num_steps: Steps per draw.
        frequency_size: Number of sines and cosines in the time embedding.
        layer_norm_eps: Epsilon of the norms.
    """

    num_blocks: int = 2
    num_draws: int = 8
    num_steps: int = 1
    frequency_size: int = 256
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_blocks", "num_draws", "num_steps")
        if self.frequency_size < 2 or self.frequency_size % 2:
            raise ValueError(f"frequency_size must be even and at least 2, got {self.frequency_size}.")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be above 0, got {self.layer_norm_eps}.")

    @property
    def calls(self) -> int:
        """Network calls per draw."""
        return self.num_steps

    def output_size(self, latent_size: int) -> int:
        """Size of the network's output for a point."""
        return latent_size

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """See `HeadConfig`; counts all steps of a draw, and assumes that all draws are made in one call."""
        square, blocks = hidden_size * hidden_size, self.num_blocks
        time_embedding = self.frequency_size * hidden_size + square
        modulations = 3 * blocks * square + 2 * square
        ends = latent_size + self.output_size(latent_size)
        point = ends * hidden_size + 2 * blocks * square
        return HeadFlops(
            shared=2 * (square + self.calls * modulations),  # Times are embedded once for all positions.
            per_draw=2 * self.calls * point,
            training_shared=6 * square,
            training_per_draw=6 * (time_embedding + modulations + point),
            training_draws=self.num_draws,
        )


class TimeEmbedding(nn.Module):
    """Times -> vectors, through sines and cosines."""

    def __init__(self, frequency_size: int, size: int) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.inp = nn.Linear(frequency_size, size)
        self.out = nn.Linear(size, size)

    def forward(self, time: Tensor) -> Tensor:
        """Times, (...) -> (..., size)."""
        half = self.frequency_size // 2
        exponents = torch.arange(half, device=time.device, dtype=torch.float32) / half
        angles = time.float().unsqueeze(-1) * torch.exp(-math.log(_LONGEST_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.out(F.silu(self.inp(waves.to(self.inp.weight.dtype))))


class StepNetwork(nn.Module):
    """Points on the path from noise to latents, their times, and a condition -> predictions there.

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
        block: Class of its blocks.
    """

    def __init__(
        self,
        config: StepHeadConfig,
        hidden_size: int,
        latent_size: int,
        block: type[AdaptiveBlock] = RecomputedBlock,
    ) -> None:
        super().__init__()
        eps = config.layer_norm_eps
        # A list of one, to match the names in released checkpoints.
        self.times = nn.ModuleList([TimeEmbedding(config.frequency_size, hidden_size)])
        self.condition_in = nn.Linear(hidden_size, hidden_size)
        self.inp = nn.Linear(latent_size, hidden_size)
        self.blocks = nn.ModuleList(block(hidden_size, eps) for _ in range(config.num_blocks))
        self.out_norm = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=False)
        self.out_modulation = ZeroLinear(hidden_size, 2 * hidden_size)
        self.out = ZeroLinear(hidden_size, config.output_size(latent_size))

    def forward(self, x_NPZ: Tensor, time: Tensor, condition_PD: Tensor) -> Tensor:
        """Predictions at all points, (N, P, `output_size`), in the points' dtype.

        Args:
            x_NPZ: Points.
            time: Time of each point, (N, P), or one for all, (); with a single time, the modulation of the
                norms is computed once for all draws of a position.
            condition_PD: Output of `condition_in` for the hidden states.
        """
        condition = F.silu(self.times[0](time) + condition_PD)
        hidden_NPD = self.inp(x_NPZ.to(self.inp.weight.dtype))
        for block in self.blocks:
            hidden_NPD = block(hidden_NPD, condition)
        shift, scale = self.out_modulation(condition).chunk(2, dim=-1)
        return self.out(self.out_norm(hidden_NPD) * (1 + scale) + shift).to(x_NPZ.dtype)


class StepHead(LatentHead):
    """A head with a `StepNetwork`.

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: StepHeadConfig

    def __init__(self, config: StepHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        self.network = StepNetwork(config, hidden_size, latent_size)

    def prepare(self, states_PD: Tensor) -> Tensor:
        """The network's condition, (P, D)."""
        return self.network.condition_in(states_PD)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that touch latents or times."""
        network = self.network
        return [network.inp, network.out, cast(TimeEmbedding, network.times[0]).inp]

    def noise_of_points(
        self, prepared_P: Tensor, num_draws: int, randomness: Randomness, recorded: Tensor | None
    ) -> Tensor:
        """Standard normal noise, (N, P, Z): recorded or fresh."""
        # At least float32, whatever the weights' dtype: many small steps are added up.
        dtype = torch.promote_types(prepared_P.dtype, torch.float32)
        if recorded is not None:
            return recorded.to(dtype)
        num_positions = prepared_P.shape[0]
        return normal(num_draws, num_positions, self.latent_size, randomness, prepared_P.device, dtype)
