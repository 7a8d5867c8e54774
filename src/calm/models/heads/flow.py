"""The flow-matching head: follows a learned velocity from noise to the next latent (paper section 3.2).

Shapes: N draws, P positions, D hidden size, Z latent size.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from calm.core.flow import CALLS_PER_STEP, Solver, solve, straight_path
from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness, normal
from calm.models.heads.adaln import AdaptiveNetwork, adaptive_multiply_adds, check_frequencies
from calm.models.heads.base import GenerativeHead, HeadConfig, HeadWork, check_counts

_TIME_SCALE = 1000  # The network's sines are made for times of this range.


@dataclass(kw_only=True)
class FlowHeadConfig(HeadConfig):
    """Fields of the flow-matching head.

    Args:
        head_type: Always "flow".
        num_blocks: Residual blocks.
        num_draws: Targets N of a position in the loss, each with a time and noise of its own.
        solver: "euler", "midpoint" or "heun".
        num_steps: Steps of the solver; midpoint and Heun call the network twice a step.
        time_bins: Whole steps to which the network's time is cut, as in released checkpoints (1000);
            0 for continuous time.
        frequency_size: Sines and cosines of a time.
        layer_norm_eps: Epsilon of the norms.
    """

    head_type: str = "flow"
    num_blocks: int = 2
    num_draws: int = 8
    solver: Solver = "midpoint"
    num_steps: int = 4
    time_bins: int = 0
    frequency_size: int = 256
    layer_norm_eps: float = 1e-6

    sampling_fields: ClassVar[tuple[str, ...]] = ("solver", "num_steps")

    def __post_init__(self) -> None:
        if self.solver not in CALLS_PER_STEP:
            raise ValueError(f"solver must be one of {', '.join(CALLS_PER_STEP)}, got '{self.solver}'.")
        check_counts(self, "num_blocks", "num_draws", "num_steps")
        check_frequencies(self.frequency_size)
        if self.time_bins < 0:
            raise ValueError(f"time_bins must be at least 0, got {self.time_bins}.")

    def work(self, hidden_size: int, latent_size: int) -> HeadWork:
        """See `HeadConfig`; the solver's steps are counted."""
        hidden, time, both, point = adaptive_multiply_adds(
            latent_size, latent_size, hidden_size, self.num_blocks, self.frequency_size
        )
        calls = self.num_steps * CALLS_PER_STEP[self.solver]
        return HeadWork(
            hidden + calls * both, calls * point, 3 * hidden, 3 * (time + both + point), self.num_draws
        )


class FlowNoise(NamedTuple):
    """All randomness of one loss: posterior noise (N, P, Z), starting points (N, P, Z), times (N, P)."""

    posterior: Tensor
    start: Tensor
    time: Tensor


class FlowHead(GenerativeHead):
    """Sampler that integrates a velocity field, trained by squared error.

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: FlowHeadConfig

    def __init__(self, config: FlowHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.config, self.latent_size = config, latent_size
        self.network = AdaptiveNetwork(
            latent_size,
            latent_size,
            hidden_size,
            config.num_blocks,
            config.frequency_size,
            config.layer_norm_eps,
        )

    def loss(
        self,
        hidden_PD: Tensor,
        posterior_PZ: DiagonalGaussian,
        generator: torch.Generator | None = None,
        noise: FlowNoise | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity at N points of every position, shape (P,)."""
        if noise is None:
            noise = draw_flow_noise(self.config.num_draws, posterior_PZ, generator)
        targets_NPZ = posterior_PZ.sample(len(noise.posterior), noise=noise.posterior)
        x_NPZ, velocity_NPZ = straight_path(noise.start, targets_NPZ, noise.time)
        predicted_NPZ = self.network(x_NPZ, (self._scaled(noise.time),), self.prepare(hidden_PD))
        return (predicted_NPZ - velocity_NPZ).square().mean(-1).mean(0)

    def prepare(self, hidden_PD: Tensor) -> Tensor:
        """The hidden state as the network takes it, (P, D)."""
        return self.network.condition_in(hidden_PD)

    def draw(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """See `GenerativeHead`; recorded noise is standard normal, of shape (N, P, Z)."""
        if noise is None:
            noise = normal(num_draws, len(prepared_P), self.latent_size, randomness, prepared_P.device)

        def velocity(x_NPZ: Tensor, time: float) -> Tensor:
            return self.network(x_NPZ, (self._scaled(x_NPZ.new_tensor(time)),), prepared_P)

        return solve(velocity, noise.float(), self.config.num_steps, self.config.solver)

    def boundary_layers(self) -> list[nn.Module]:
        """See `GenerativeHead`."""
        return self.network.boundary_layers()

    def _scaled(self, time: Tensor) -> Tensor:
        bins = self.config.time_bins
        return (bins * time).floor() if bins else _TIME_SCALE * time


def draw_flow_noise(
    num_draws: int, posterior_PZ: DiagonalGaussian, generator: torch.Generator | None
) -> FlowNoise:
    """Fresh randomness of one loss."""
    mean_PZ = posterior_PZ.mean
    shape, device = (num_draws, *mean_PZ.shape), mean_PZ.device
    return FlowNoise(
        torch.randn(shape, generator=generator, device=device),
        torch.randn(shape, generator=generator, device=device),
        torch.rand(shape[:-1], generator=generator, device=device),
    )
