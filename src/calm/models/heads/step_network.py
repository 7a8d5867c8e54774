"""What the heads that take several steps share: a residual MLP whose norms time and hidden state shift and
scale (adaptive layer norm; paper section 3.2), and what follows from having one.

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
"""From noise to data, in what the sines of the network are made for."""
_LONGEST_PERIOD = 10000.0


@dataclass(kw_only=True)
class StepHeadConfig(HeadConfig):
    """Fields of every head that takes steps.

    Args:
        num_blocks: Residual blocks.
        num_draws: Targets N of a position in the loss, each with times and noise of its own.
        num_steps: Steps of a draw.
        frequency_size: Sines and cosines of a time.
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
        """Network calls of a draw."""
        return self.num_steps

    def output_size(self, latent_size: int) -> int:
        """Numbers that the network gives for a point."""
        return latent_size

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """See `HeadConfig`; all steps of a draw are counted, and drawing all at once is assumed."""
        square, blocks = hidden_size * hidden_size, self.num_blocks
        of_time = self.frequency_size * hidden_size + square
        of_norms = 3 * blocks * square + 2 * square
        ends = latent_size + self.output_size(latent_size)
        of_point = ends * hidden_size + 2 * blocks * square
        return HeadFlops(
            shared=2 * (square + self.calls * of_norms),  # Times are embedded once for all positions.
            per_draw=2 * self.calls * of_point,
            training_shared=6 * square,
            training_per_draw=6 * (of_time + of_norms + of_point),
            training_draws=self.num_draws,
        )


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time -> a vector."""

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
    """Points on the way from noise to latents, their times, and a condition -> what is predicted there.

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
        block: Kind of its blocks.
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
        # A list of one, which is how released checkpoints name it.
        self.times = nn.ModuleList([TimeEmbedding(config.frequency_size, hidden_size)])
        self.condition_in = nn.Linear(hidden_size, hidden_size)
        self.inp = nn.Linear(latent_size, hidden_size)
        self.blocks = nn.ModuleList(block(hidden_size, eps) for _ in range(config.num_blocks))
        self.out_norm = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=False)
        self.out_modulation = ZeroLinear(hidden_size, 2 * hidden_size)
        self.out = ZeroLinear(hidden_size, config.output_size(latent_size))

    def forward(self, x_NPZ: Tensor, time: Tensor, condition_PD: Tensor) -> Tensor:
        """What is predicted at every point, (N, P, `output_size`), in the type of the points.

        Args:
            x_NPZ: Points.
            time: Of each point, (N, P), or one for all, (); in the latter case what time and condition make
                of the norms is computed once for all draws of a position.
            condition_PD: What `condition_in` makes of the hidden states.
        """
        condition = F.silu(self.times[0](time) + condition_PD)
        hidden_NPD = self.inp(x_NPZ.to(self.inp.weight.dtype))
        for block in self.blocks:
            hidden_NPD = block(hidden_NPD, condition)
        shift, scale = self.out_modulation(condition).chunk(2, dim=-1)
        return self.out(self.out_norm(hidden_NPD) * (1 + scale) + shift).to(x_NPZ.dtype)


class StepHead(LatentHead):
    """A head with such a network.

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
        """The hidden state as the network takes it, (P, D)."""
        return self.network.condition_in(states_PD)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that meet latents or times."""
        network = self.network
        return [network.inp, network.out, cast(TimeEmbedding, network.times[0]).inp]

    def noise_of_points(
        self, prepared_P: Tensor, num_draws: int, randomness: Randomness, recorded: Tensor | None
    ) -> Tensor:
        """Standard normal noise, (N, P, Z): what was recorded, or fresh."""
        # At least float32, whatever the weights are: many small steps are added up.
        dtype = torch.promote_types(prepared_P.dtype, torch.float32)
        if recorded is not None:
            return recorded.to(dtype)
        num_positions = prepared_P.shape[0]
        return normal(num_draws, num_positions, self.latent_size, randomness, prepared_P.device, dtype)
