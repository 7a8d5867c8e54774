"""The diffusion head: denoises step by step to reach the next latent (paper section 3.2).

Shapes: N draws, P positions, D hidden size, Z latent size.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from calm.core.diffusion import Coefficients, DiffusionSampler, NoiseSchedule, hybrid_loss, sample
from calm.core.random import Randomness
from calm.models.heads.contract import Target
from calm.models.heads.step_network import StepHead, StepHeadConfig

# The deterministic samplers skip steps with less signal than this: there, the network's error is divided by
# nearly zero to predict the latent, and later steps cannot correct a wrong start.
_MIN_SIGNAL = 2.5e-3


@dataclass(kw_only=True)
class DiffusionHeadConfig(StepHeadConfig):
    """Fields of the diffusion head.

    Args:
        head_type: Always "diffusion".
        num_blocks: Residual blocks.
        num_draws: Targets N per position in the loss, each with its own step and noise.
        num_timesteps: Steps T of the diffusion.
        sampler: "ancestral", or the deterministic "ddim" and "dpm" (see calm.core.diffusion).
        num_steps: Steps per draw, spread over the T.
        data_bound: Predicted latents are clamped to ± this while sampling; 0 for no clamp, as in released
            checkpoints.
        image_likelihood: Train the variance of the first step as if latents were 8-bit pixels, as the
            released code does.
        frequency_size: Number of sines and cosines in the time embedding.
        layer_norm_eps: Epsilon of the norms.
    """

    head_type: str = "diffusion"
    num_timesteps: int = 1000
    sampler: DiffusionSampler = "ancestral"
    num_steps: int = 100
    data_bound: float = 8.0
    image_likelihood: bool = False

    sampling_fields: ClassVar[tuple[str, ...]] = ("sampler", "num_steps", "data_bound")

    def output_size(self, latent_size: int) -> int:
        """See `StepHeadConfig`: the noise in a point, and its variance."""
        return 2 * latent_size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {self.num_timesteps}.")
        num_usable = len(_usable_steps(self.num_timesteps, self.sampler).steps)
        if self.num_steps > num_usable:
            raise ValueError(
                f"num_steps must be at most {num_usable} for the sampler {self.sampler} of a diffusion of "
                f"{self.num_timesteps} steps, got {self.num_steps}."
            )
        if self.data_bound < 0:
            raise ValueError(f"data_bound must be at least 0, got {self.data_bound}.")


class DiffusionNoise(NamedTuple):
    """All randomness of one loss: posterior noise (N, P, Z), added noise (N, P, Z), steps (N, P)."""

    posterior: Tensor
    added: Tensor
    step: Tensor


class DiffusionHead(StepHead):
    """Sampler that denoises, trained to predict the noise and its variance."""

    config: DiffusionHeadConfig

    def __init__(self, config: DiffusionHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        self._coefficients = NoiseSchedule.cosine(config.num_timesteps).table()

    def _loss(self, states_PD: Tensor, target: Target, noise: DiffusionNoise) -> Tensor:
        """Hybrid loss at N steps per position, shape (P,); see `calm.core.diffusion`."""
        data_NPZ = target.posterior_PZ.sample(len(noise.posterior), noise=noise.posterior)
        step = Coefficients.look_up(self._coefficients, noise.step)
        x_NPZ = step.signal * data_NPZ + step.noise * noise.added
        out = self.network(x_NPZ, noise.step, self.prepare(states_PD))
        predicted_NPZ, fraction_NPZ = out.chunk(2, dim=-1)
        loss_NP = hybrid_loss(
            step,
            noise.step == 0,
            data_NPZ,
            noise.added,
            x_NPZ,
            predicted_NPZ,
            fraction_NPZ,
            as_image=self.config.image_likelihood,
        )
        return loss_NP.mean(0)

    def draw_latents(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """See `LatentHead`.

        Recorded noise is standard normal, (S, N, P, Z): the starting points, then the noise of each of S - 1
        steps, all but the last (the deterministic samplers need only the starting points).
        """
        config = self.config

        def noise_at(index: int) -> Tensor:
            recorded = None if noise is None else noise[index]
            return self.noise_of_points(prepared_P, num_draws, randomness, recorded)

        def predict(x_NPZ: Tensor, step: int) -> tuple[Tensor, Tensor]:
            time = torch.full((), float(step), device=x_NPZ.device)
            predicted_NPZ, fraction_NPZ = self.network(x_NPZ, time, prepared_P).chunk(2, dim=-1)
            return predicted_NPZ, fraction_NPZ

        return sample(
            _usable_steps(config.num_timesteps, config.sampler).respaced(config.num_steps),
            predict,
            noise_at(0),
            config.sampler,
            lambda steps_taken: noise_at(steps_taken + 1),
            config.data_bound or None,
        )

    def draw_noise(
        self, num_positions: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> DiffusionNoise:
        """See `GenerativeHead`."""
        shape = (self.config.num_draws, num_positions, self.latent_size)
        return DiffusionNoise(
            torch.randn(shape, generator=generator, device=device),
            torch.randn(shape, generator=generator, device=device),
            torch.randint(self.config.num_timesteps, shape[:-1], generator=generator, device=device),
        )


@functools.cache
def _usable_steps(num_timesteps: int, sampler: DiffusionSampler) -> NoiseSchedule:
    """The steps that a sampler may choose from."""
    schedule = NoiseSchedule.cosine(num_timesteps)
    return schedule if sampler == "ancestral" else schedule.with_signal(_MIN_SIGNAL)
