"""A generative head outside the package, in one file: MeanFlow, one network call from noise to a latent.

    python examples/a_head_of_your_own.py train --recipe demo_flow --data.sources my_texts/ \\
        --language_model.head '{"head_type": "mean_flow"}' --output runs/mean_flow
    python examples/a_head_of_your_own.py generate runs/mean_flow/model "Once upon a time"

That is the `calm` command, with this head among those it knows. An installed package does without such a
script: it names its module as an entry point of the group "calm.heads" (docs/heads.md).

The head learns the average velocity u between two times t <= s of the straight path from noise (t = 0) to
data (t = 1), so that a draw is x_0 + u(x_0, 0, 1) (MeanFlow, arXiv 2505.13447). At the same budget it scores
below flow matching on our stories (docs/log.md), which is why it lives here.

Shapes: N draws, P positions, D hidden size, Z latent size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, func, nn

from calm import register_head
from calm.cli import main
from calm.core.flow import straight_path
from calm.core.random import Randomness
from calm.models.blocks import AdaptiveBlock
from calm.models.heads import HeadFlops, Target
from calm.models.heads.step_network import (
    StepHead,
    StepHeadConfig,
    StepNetwork,
    TimeEmbedding,
)

# From noise to data: the loss takes derivatives by time, and the network's fast sines would dominate them if
# time ran to 1000.
UNITS_OF_TIME = 10


@dataclass(kw_only=True)
class MeanFlowHeadConfig(StepHeadConfig):
    """Fields of the head, as a recipe or checkpoint gives them.

    Args:
        head_type: Always "mean_flow".
        num_blocks: Residual blocks.
        num_draws: Targets N per position in the loss, each with its own times and noise.
        num_steps: Equal steps from noise to data; one is what it is trained for.
        instant_fraction: Share of targets with t = s, where the average velocity is the velocity.
        frequency_size: Number of sines and cosines in the time embedding.
        layer_norm_eps: Epsilon of the norms.
    """

    head_type: str = "mean_flow"
    instant_fraction: float = 0.75

    # What may change after training: `calm evaluate --head '{"num_steps": 2}'`.
    sampling_fields: ClassVar[tuple[str, ...]] = ("num_steps",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.instant_fraction <= 1:
            raise ValueError(f"instant_fraction must lie in [0, 1], got {self.instant_fraction}.")

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """What `calm flops` counts. Training takes five forward passes: torch's derivative costs two more."""
        network = super().flops(hidden_size, latent_size)
        span = 6 * (self.frequency_size * hidden_size + hidden_size**2)
        return network._replace(training_per_draw=(network.training_per_draw + span) * 5 // 3)


class MeanFlowNoise(NamedTuple):
    """All randomness of one loss: posterior noise and starting points (N, P, Z), times t <= s (N, P)."""

    posterior: Tensor
    start: Tensor
    time: Tensor
    end: Tensor


class MeanFlowHead(StepHead):
    """Single-step sampler that learns an average velocity, trained by squared error."""

    config: MeanFlowHeadConfig

    def __init__(self, config: MeanFlowHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        # Without gradient checkpointing: there is none inside a forward derivative.
        self.network = StepNetwork(config, hidden_size, latent_size, block=AdaptiveBlock)
        self.span = TimeEmbedding(config.frequency_size, hidden_size)

    def draw_noise(
        self, num_positions: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> MeanFlowNoise:
        """All random numbers of a loss, so that training can draw them for each block by itself."""
        shape = (self.config.num_draws, num_positions, self.latent_size)
        times = torch.rand((2, *shape[:-1]), generator=generator, device=device)
        is_instant = torch.rand(shape[:-1], generator=generator, device=device) < self.config.instant_fraction
        start, end = times.amin(0), times.amax(0)
        return MeanFlowNoise(
            torch.randn(shape, generator=generator, device=device),
            torch.randn(shape, generator=generator, device=device),
            start,
            torch.where(is_instant, start, end),
        )

    def _loss(self, states_PD: Tensor, target: Target, noise: MeanFlowNoise) -> Tensor:
        """Mean squared error of the average velocity at N pairs of times of every position, (P,)."""
        data_NPZ = target.posterior_PZ.sample(len(noise.posterior), noise=noise.posterior)
        x_NPZ, velocity_NPZ = straight_path(noise.start, data_NPZ, noise.time)
        prepared_PD = self.prepare(states_PD)

        def average(x_NPZ: Tensor, time_NP: Tensor) -> Tensor:
            return self._average_velocity(x_NPZ, time_NP, noise.end, prepared_PD)

        # Along the path x moves with the velocity and t with 1; s stays.
        along = (velocity_NPZ, torch.ones_like(noise.time))
        predicted_NPZ, change_NPZ = _value_and_change(average, (x_NPZ, noise.time), along)
        target_NPZ = average_velocity_target(velocity_NPZ, change_NPZ.detach(), noise.time, noise.end)
        return (predicted_NPZ - target_NPZ).square().mean(-1).mean(0)

    def draw_latents(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Latents (N, P, Z); recorded noise is standard normal, of the same shape."""
        x_NPZ = self.noise_of_points(prepared_P, num_draws, randomness, noise)
        steps = self.config.num_steps
        for step in range(steps):
            time, end = (torch.full((), t / steps, device=x_NPZ.device) for t in (step, step + 1))
            x_NPZ = x_NPZ + self._average_velocity(x_NPZ, time, end, prepared_P) / steps
        return x_NPZ

    def boundary_layers(self) -> list[nn.Module]:
        """Layers that meet noise, latents or times: Muon leaves them to AdamW."""
        return [*super().boundary_layers(), self.span.inp]

    def _average_velocity(self, x_NPZ: Tensor, time: Tensor, end: Tensor, prepared_PD: Tensor) -> Tensor:
        condition = prepared_PD + self.span(UNITS_OF_TIME * (end - time))
        return self.network(x_NPZ, UNITS_OF_TIME * time, condition)


def average_velocity_target(velocity: Tensor, change: Tensor, time: Tensor, end: Tensor) -> Tensor:
    """What the average velocity from t to s must be, if it changes by `change` along the path.

    Differentiating (s - t) u(x_t, t, s) = integral of the velocity from t to s gives u = v + (s - t) du/dt.

    Args:
        velocity: Of the path at t, (..., Z).
        change: Derivative of the average velocity along the path, (..., Z).
        time: t, (...).
        end: s >= t, (...).
    """
    return velocity + (end - time).unsqueeze(-1) * change


def _value_and_change(
    function: Any, at: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The value of a function, and its derivative along a direction."""
    jvp = torch.compiler.disable(func.jvp)  # torch.compile cannot trace one of layer norms.
    value, change = jvp(function, at, along)
    return value, change


register_head("mean_flow", MeanFlowHeadConfig, MeanFlowHead)

if __name__ == "__main__":
    main()
