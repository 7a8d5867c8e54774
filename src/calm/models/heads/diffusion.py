"""The diffusion head: removes noise step by step to reach the next latent (paper section 3.2).

Shapes: N draws, P positions, D hidden size, Z latent size.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

import torch
from torch import Tensor, nn

from calm.core.diffusion import DiffusionSampler, NoiseSchedule, hybrid_loss, sample
from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness, normal
from calm.models.heads.adaln import AdaptiveNetwork, adaptive_multiply_adds, check_frequencies
from calm.models.heads.base import GenerativeHead, HeadConfig, HeadWork, check_counts

# The deterministic samplers leave out steps with less signal: there the foreseen latent is an error of the
# network divided by nearly zero, and nothing later makes up for a wrong start.
_LEAST_SIGNAL = 2.5e-3


@dataclass(kw_only=True)
class DiffusionHeadConfig(HeadConfig):
    """Fields of the diffusion head.

    Args:
        head_type: Always "diffusion".
        num_blocks: Residual blocks.
        num_draws: Targets N of a position in the loss, each with a step and noise of its own.
        num_timesteps: Steps T of the diffusion.
        sampler: "ancestral", or the deterministic "ddim" and "dpm" (see calm.core.diffusion).
        num_steps: Steps that a draw takes, spread over the T.
        data_bound: Latents that the network foresees are clamped to ± this while drawing; 0 for no
            bound, as in released checkpoints.
        image_likelihood: Train the variance of the first step as if latents were 8-bit pixels, as the
            released code does.
        frequency_size: Sines and cosines of a time.
        layer_norm_eps: Epsilon of the norms.
    """

    head_type: str = "diffusion"
    num_blocks: int = 2
    num_draws: int = 8
    num_timesteps: int = 1000
    sampler: DiffusionSampler = "ancestral"
    num_steps: int = 100
    data_bound: float = 8.0
    image_likelihood: bool = False
    frequency_size: int = 256
    layer_norm_eps: float = 1e-6

    sampling_fields: ClassVar[tuple[str, ...]] = ("sampler", "num_steps", "data_bound")

    def __post_init__(self) -> None:
        if self.sampler not in (samplers := get_args(DiffusionSampler)):
            raise ValueError(f"sampler must be one of {', '.join(samplers)}, got '{self.sampler}'.")
        check_counts(self, "num_blocks", "num_draws", "num_timesteps", "num_steps")
        check_frequencies(self.frequency_size)
        if self.num_steps > self.num_timesteps:
            raise ValueError(
                f"num_steps must be at most num_timesteps ({self.num_timesteps}), got {self.num_steps}."
            )
        if self.data_bound < 0:
            raise ValueError(f"data_bound must be at least 0, got {self.data_bound}.")

    def work(self, hidden_size: int, latent_size: int) -> HeadWork:
        """See `HeadConfig`; the steps of a draw are counted."""
        hidden, time, both, point = adaptive_multiply_adds(
            latent_size, 2 * latent_size, hidden_size, self.num_blocks, self.frequency_size
        )
        steps = self.num_steps
        return HeadWork(
            hidden + steps * both, steps * point, 3 * hidden, 3 * (time + both + point), self.num_draws
        )


class DiffusionNoise(NamedTuple):
    """All randomness of one loss: posterior noise (N, P, Z), added noise (N, P, Z), steps (N, P)."""

    posterior: Tensor
    added: Tensor
    step: Tensor


class DiffusionHead(GenerativeHead):
    """Sampler that removes noise, trained to predict it and its variance.

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: DiffusionHeadConfig

    def __init__(self, config: DiffusionHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.config, self.latent_size = config, latent_size
        self.network = AdaptiveNetwork(
            latent_size,
            2 * latent_size,
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
        noise: DiffusionNoise | None = None,
    ) -> Tensor:
        """Hybrid loss at N steps of every position, shape (P,); see `calm.core.diffusion`."""
        if noise is None:
            noise = self._draw_noise(posterior_PZ, generator)
        data_NPZ = posterior_PZ.sample(len(noise.posterior), noise=noise.posterior)
        step = _schedule(self.config.num_timesteps).at(noise.step, data_NPZ.device)
        x_NPZ = step.signal * data_NPZ + step.noise * noise.added
        out = self.network(x_NPZ, (noise.step,), self.prepare(hidden_PD))
        predicted_NPZ, fraction_NPZ = out.chunk(2, dim=-1)
        loss_NP = hybrid_loss(
            step,
            noise.step == 0,
            data_NPZ,
            noise.added,
            predicted_NPZ,
            fraction_NPZ,
            as_image=self.config.image_likelihood,
        )
        return loss_NP.mean(0)

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
        """See `GenerativeHead`.

        Recorded noise is standard normal, (S, N, P, Z): the start, then that of each step but the last (which
        the deterministic samplers do not need).
        """
        config, device = self.config, prepared_P.device

        def fresh() -> Tensor:
            return normal(num_draws, len(prepared_P), self.latent_size, randomness, device)

        def step_noise(taken: int) -> Tensor:
            return fresh() if noise is None else noise[taken + 1]

        def predict(x_NPZ: Tensor, step: int) -> tuple[Tensor, Tensor]:
            out = self.network(x_NPZ, (x_NPZ.new_tensor(step),), prepared_P)
            predicted_NPZ, fraction_NPZ = out.chunk(2, dim=-1)
            return predicted_NPZ, fraction_NPZ

        start = fresh() if noise is None else noise[0].float()
        least_signal = 0.0 if config.sampler == "ancestral" else _LEAST_SIGNAL
        schedule = _schedule(config.num_timesteps, config.num_steps, least_signal)
        return sample(schedule, predict, start, config.sampler, step_noise, config.data_bound or None)

    def boundary_layers(self) -> list[nn.Module]:
        """See `GenerativeHead`."""
        return self.network.boundary_layers()

    def _draw_noise(
        self, posterior_PZ: DiagonalGaussian, generator: torch.Generator | None
    ) -> DiffusionNoise:
        mean_PZ = posterior_PZ.mean
        shape, device = (self.config.num_draws, *mean_PZ.shape), mean_PZ.device
        return DiffusionNoise(
            torch.randn(shape, generator=generator, device=device),
            torch.randn(shape, generator=generator, device=device),
            torch.randint(self.config.num_timesteps, shape[:-1], generator=generator, device=device),
        )


@functools.cache
def _schedule(num_timesteps: int, num_steps: int | None = None, least_signal: float = 0.0) -> NoiseSchedule:
    """The cosine schedule, whole or in fewer steps."""
    whole = NoiseSchedule.cosine(num_timesteps)
    return whole if num_steps is None else whole.respaced(num_steps, least_signal)
