"""The flow-matching head: integrates a learned velocity from noise to the next latent (paper section 3.2).

Shapes: N draws, P positions, D hidden size, Z latent size.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from calm.core.flow import CALLS_PER_STEP, Solver, solve, straight_path
from calm.core.random import Randomness
from calm.models.heads.contract import Target
from calm.models.heads.step_network import UNITS_OF_TIME, StepHead, StepHeadConfig


@dataclass(kw_only=True)
class FlowHeadConfig(StepHeadConfig):
    """Fields of the flow-matching head.

    Args:
        head_type: Always "flow".
        num_blocks: Residual blocks.
        num_draws: Targets N per position in the loss, each with its own time and noise.
        solver: "euler", "midpoint" or "heun".
        num_steps: Solver steps; midpoint and Heun call the network twice per step.
        time_bins: Number of bins that time is rounded down to, as in released checkpoints (1000);
            0 for continuous time.
        frequency_size: Number of sines and cosines in the time embedding.
        layer_norm_eps: Epsilon of the norms.
    """

    head_type: str = "flow"
    solver: Solver = "midpoint"
    num_steps: int = 4
    time_bins: int = 0

    sampling_fields: ClassVar[tuple[str, ...]] = ("solver", "num_steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_bins < 0:
            raise ValueError(f"time_bins must be at least 0, got {self.time_bins}.")

    @property
    def calls(self) -> int:
        """Network calls per draw."""
        return self.num_steps * CALLS_PER_STEP[self.solver]


class FlowNoise(NamedTuple):
    """All randomness of one loss: posterior noise (N, P, Z), starting points (N, P, Z), times (N, P)."""

    posterior: Tensor
    start: Tensor
    time: Tensor


class FlowHead(StepHead):
    """Sampler that integrates a velocity field, trained with squared error."""

    config: FlowHeadConfig

    def _loss(self, states_PD: Tensor, target: Target, noise: FlowNoise) -> Tensor:
        """Mean squared error of the velocity at N points per position, shape (P,)."""
        targets_NPZ = target.posterior_PZ.sample(len(noise.posterior), noise=noise.posterior)
        x_NPZ, velocity_NPZ = straight_path(noise.start, targets_NPZ, noise.time)
        predicted_NPZ = self.network(x_NPZ, self._network_time(noise.time), self.prepare(states_PD))
        return (predicted_NPZ - velocity_NPZ).square().mean(-1).mean(0)

    def draw_latents(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """See `LatentHead`; recorded noise is standard normal, of shape (N, P, Z)."""
        start_NPZ = self.noise_of_points(prepared_P, num_draws, randomness, noise)

        def velocity(x_NPZ: Tensor, time: float) -> Tensor:
            network_time = self._network_time(torch.full((), time, device=x_NPZ.device))
            return self.network(x_NPZ, network_time, prepared_P)

        return solve(velocity, start_NPZ, self.config.num_steps, self.config.solver)

    def _network_time(self, time: Tensor) -> Tensor:
        """Times from 0 to 1, as numbers for the network's time embedding."""
        bins = self.config.time_bins
        # Heun's solver also evaluates time 1, which is in no bin.
        return (bins * time).floor().clamp_max(bins - 1) if bins else UNITS_OF_TIME * time

    def draw_noise(
        self, num_positions: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> FlowNoise:
        """See `GenerativeHead`."""
        shape = (self.config.num_draws, num_positions, self.latent_size)
        return FlowNoise(
            torch.randn(shape, generator=generator, device=device),
            torch.randn(shape, generator=generator, device=device),
            torch.rand(shape[:-1], generator=generator, device=device),
        )
