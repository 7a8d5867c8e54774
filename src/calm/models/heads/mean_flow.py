"""An experiment: the MeanFlow head, one network call from noise to the next latent (arXiv 2505.13447).

The network learns the average velocity u between two times t <= s of the straight path from noise (t = 0) to
data (t = 1), so that a draw is x_0 + u(x_0, 0, 1). The paper on CALM does not have it; docs/benchmarks.md
says how it fares.
Shapes: N draws, P positions, D hidden size, Z latent size.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, func, nn

from calm.core.flow import average_velocity_target, straight_path
from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness, normal
from calm.models.heads.adaln import AdaptiveNetwork, adaptive_multiply_adds, check_frequencies
from calm.models.heads.base import GenerativeHead, HeadConfig, HeadWork, check_counts

_TIME_SCALE = 10  # The loss takes derivatives by time, which the fast sines of longer ranges would dominate.


@dataclass(kw_only=True)
class MeanFlowHeadConfig(HeadConfig):
    """Fields of the MeanFlow head.

    Args:
        head_type: Always "mean_flow".
        num_blocks: Residual blocks.
        num_draws: Targets N of a position in the loss, each with times and noise of its own.
        num_steps: Equal steps from noise to data; one is what it is trained for.
        instant_fraction: Share of targets with t = s, where the average velocity is the velocity.
        weight_power: Targets are weighted by 1 / (squared error + 1e-3)^p, as the paper on MeanFlow does with
            p = 1; in few dimensions that draws the common mode too often (tests/statistical/test_heads.py).
        frequency_size: Sines and cosines of a time.
        layer_norm_eps: Epsilon of the norms.
    """

    head_type: str = "mean_flow"
    num_blocks: int = 2
    num_draws: int = 8
    num_steps: int = 1
    instant_fraction: float = 0.75
    weight_power: float = 0.0
    frequency_size: int = 256
    layer_norm_eps: float = 1e-6

    sampling_fields: ClassVar[tuple[str, ...]] = ("num_steps",)

    def __post_init__(self) -> None:
        check_counts(self, "num_blocks", "num_draws", "num_steps")
        check_frequencies(self.frequency_size)
        if not 0 <= self.instant_fraction <= 1:
            raise ValueError(f"instant_fraction must lie in [0, 1], got {self.instant_fraction}.")
        if self.weight_power < 0:
            raise ValueError(f"weight_power must be at least 0, got {self.weight_power}.")

    def work(self, hidden_size: int, latent_size: int) -> HeadWork:
        """See `HeadConfig`; the derivative along the path takes torch two more forward passes in training."""
        hidden, time, both, point = adaptive_multiply_adds(
            latent_size, latent_size, hidden_size, self.num_blocks, self.frequency_size, num_times=2
        )
        steps = self.num_steps
        return HeadWork(
            hidden + steps * both, steps * point, 3 * hidden, 5 * (time + both + point), self.num_draws
        )


class MeanFlowNoise(NamedTuple):
    """All randomness of one loss: posterior noise and starting points (N, P, Z), times t <= s (N, P)."""

    posterior: Tensor
    start: Tensor
    time: Tensor
    end: Tensor


class MeanFlowHead(GenerativeHead):
    """Single-step sampler that learns an average velocity.

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: MeanFlowHeadConfig

    def __init__(self, config: MeanFlowHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.config, self.latent_size = config, latent_size
        self.network = AdaptiveNetwork(
            latent_size,
            latent_size,
            hidden_size,
            config.num_blocks,
            config.frequency_size,
            config.layer_norm_eps,
            num_times=2,
        )

    def loss(
        self,
        hidden_PD: Tensor,
        posterior_PZ: DiagonalGaussian,
        generator: torch.Generator | None = None,
        noise: MeanFlowNoise | None = None,
    ) -> Tensor:
        """Weighted squared error of the average velocity at N pairs of times a position, shape (P,)."""
        if noise is None:
            noise = self._draw_noise(posterior_PZ, generator)
        targets_NPZ = posterior_PZ.sample(len(noise.posterior), noise=noise.posterior)
        x_NPZ, velocity_NPZ = straight_path(noise.start, targets_NPZ, noise.time)
        prepared_PD = self.prepare(hidden_PD)

        def average(x_NPZ: Tensor, time_NP: Tensor) -> Tensor:
            return self._average_velocity(x_NPZ, time_NP, noise.end, prepared_PD)

        # Along the path x moves with the velocity and t with 1; s stays.
        predicted_NPZ, change_NPZ = func.jvp(  # type: ignore[misc]
            average, (x_NPZ, noise.time), (velocity_NPZ, torch.ones_like(noise.time))
        )
        target_NPZ = average_velocity_target(velocity_NPZ, change_NPZ.detach(), noise.time, noise.end)
        error_NP = (predicted_NPZ - target_NPZ).square().mean(-1)
        weight_NP = (error_NP.detach() + 1e-3) ** -self.config.weight_power
        return (weight_NP * error_NP).mean(0)

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
        x_NPZ, steps = noise.float(), self.config.num_steps
        for step in range(steps):
            time, end = x_NPZ.new_tensor(step / steps), x_NPZ.new_tensor((step + 1) / steps)
            x_NPZ = x_NPZ + self._average_velocity(x_NPZ, time, end, prepared_P) / steps
        return x_NPZ

    def boundary_layers(self) -> list[nn.Module]:
        """See `GenerativeHead`."""
        return self.network.boundary_layers()

    def _average_velocity(self, x_NPZ: Tensor, time: Tensor, end: Tensor, prepared_PD: Tensor) -> Tensor:
        return self.network(x_NPZ, (_TIME_SCALE * time, _TIME_SCALE * (end - time)), prepared_PD)

    def _draw_noise(self, posterior_PZ: DiagonalGaussian, generator: torch.Generator | None) -> MeanFlowNoise:
        mean_PZ = posterior_PZ.mean
        shape, device = (self.config.num_draws, *mean_PZ.shape), mean_PZ.device
        times = torch.rand((2, *shape[:-1]), generator=generator, device=device)
        is_instant = torch.rand(shape[:-1], generator=generator, device=device) < self.config.instant_fraction
        start, end = times.amin(0), times.amax(0)
        return MeanFlowNoise(
            torch.randn(shape, generator=generator, device=device),
            torch.randn(shape, generator=generator, device=device),
            start,
            torch.where(is_instant, start, end),
        )
