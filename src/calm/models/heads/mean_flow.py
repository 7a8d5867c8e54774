"""An experiment: the MeanFlow head, one network call from noise to the next latent (arXiv 2505.13447).

The network learns the average velocity u between two times t <= s of the straight path from noise (t = 0) to
data (t = 1), so that a draw is x_0 + u(x_0, 0, 1). The paper on CALM does not have it; docs/benchmarks.md
says how it fares.
Shapes: N draws, P positions, D hidden size, Z latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, func

from calm.core.flow import average_velocity_target, straight_path
from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness
from calm.models.heads.adaln import AdaptiveHead, AdaptiveHeadConfig

# From noise to data: the loss takes derivatives by time, and the network's fast sines would dominate them
# if time ran to 1000.
_UNITS_OF_TIME = 10


@dataclass(kw_only=True)
class MeanFlowHeadConfig(AdaptiveHeadConfig):
    """Fields of the MeanFlow head.

    Args:
        head_type: Always "mean_flow".
        num_blocks: Residual blocks.
        num_draws: Targets N of a position in the loss, each with times and noise of its own.
        num_steps: Equal steps from noise to data; one is what it is trained for.
        instant_fraction: Share of targets with t = s, where the average velocity is the velocity.
        frequency_size: Sines and cosines of a time.
        layer_norm_eps: Epsilon of the norms.
    """

    head_type: str = "mean_flow"
    instant_fraction: float = 0.75

    sampling_fields: ClassVar[tuple[str, ...]] = ("num_steps",)
    times: ClassVar[int] = 2
    training_passes: ClassVar[int] = 5  # torch takes two more forward passes for the derivative.
    can_recompute: ClassVar[bool] = False  # Not inside a forward derivative.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.instant_fraction <= 1:
            raise ValueError(f"instant_fraction must lie in [0, 1], got {self.instant_fraction}.")


class MeanFlowNoise(NamedTuple):
    """All randomness of one loss: posterior noise and starting points (N, P, Z), times t <= s (N, P)."""

    posterior: Tensor
    start: Tensor
    time: Tensor
    end: Tensor


class MeanFlowHead(AdaptiveHead):
    """Single-step sampler that learns an average velocity, trained by squared error."""

    config: MeanFlowHeadConfig

    def loss(
        self,
        hidden_PD: Tensor,
        posterior_PZ: DiagonalGaussian,
        generator: torch.Generator | None = None,
        noise: MeanFlowNoise | None = None,
    ) -> Tensor:
        """Mean squared error of the average velocity at N pairs of times of every position, shape (P,)."""
        if noise is None:
            noise = self.draw_noise(len(hidden_PD), posterior_PZ.mean.shape[-1], generator, hidden_PD.device)
        targets_NPZ = posterior_PZ.sample(len(noise.posterior), noise=noise.posterior)
        x_NPZ, velocity_NPZ = straight_path(noise.start, targets_NPZ, noise.time)
        prepared_PD = self.prepare(hidden_PD)

        def average(x_NPZ: Tensor, time_NP: Tensor) -> Tensor:
            return self._average_velocity(x_NPZ, time_NP, noise.end, prepared_PD)

        # Along the path x moves with the velocity and t with 1; s stays.
        predicted_NPZ, change_NPZ = _value_and_change(
            average, (x_NPZ, noise.time), (velocity_NPZ, torch.ones_like(noise.time))
        )
        target_NPZ = average_velocity_target(velocity_NPZ, change_NPZ.detach(), noise.time, noise.end)
        return (predicted_NPZ - target_NPZ).square().mean(-1).mean(0)

    def draw(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """See `GenerativeHead`; recorded noise is standard normal, of shape (N, P, Z)."""
        x_NPZ = self.noise_of_points(prepared_P, num_draws, randomness, noise)
        steps = self.config.num_steps
        for step in range(steps):
            time, end = (torch.full((), t / steps, device=x_NPZ.device) for t in (step, step + 1))
            x_NPZ = x_NPZ + self._average_velocity(x_NPZ, time, end, prepared_P) / steps
        return x_NPZ

    def _average_velocity(self, x_NPZ: Tensor, time: Tensor, end: Tensor, prepared_PD: Tensor) -> Tensor:
        times = (_UNITS_OF_TIME * time, _UNITS_OF_TIME * (end - time))
        return self.network(x_NPZ, times, prepared_PD)

    def draw_noise(
        self,
        num_positions: int,
        latent_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> MeanFlowNoise:
        """See `GenerativeHead`."""
        shape = (self.config.num_draws, num_positions, latent_size)
        times = torch.rand((2, *shape[:-1]), generator=generator, device=device)
        is_instant = torch.rand(shape[:-1], generator=generator, device=device) < self.config.instant_fraction
        start, end = times.amin(0), times.amax(0)
        return MeanFlowNoise(
            torch.randn(shape, generator=generator, device=device),
            torch.randn(shape, generator=generator, device=device),
            start,
            torch.where(is_instant, start, end),
        )


@torch.compiler.disable  # torch.compile cannot trace a forward derivative of layer norms.
def _value_and_change(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The value of a function, and its derivative along a direction."""
    value, change = func.jvp(function, at, along)  # type: ignore[misc]
    return value, change
