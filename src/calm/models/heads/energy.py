"""The energy head: one network pass turns noise and a hidden state into a draw (paper section 3.3).

Shapes: N draws, M posterior draws, P positions, D hidden size, Z latent size, U noise size.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from calm.core.energy import energy_loss, energy_loss_to_gaussian
from calm.core.random import Randomness, uniform
from calm.models.blocks import SlicedLinear, ZeroLinear
from calm.models.heads.contract import LatentHead, Target
from calm.models.heads.fields import HeadConfig, HeadFlops


@dataclass(kw_only=True)
class EnergyHeadConfig(HeadConfig):
    """Fields of the energy head.

    Args:
        head_type: Always "energy".
        noise_size: Dimensions of the uniform noise.
        num_blocks: Residual blocks; the paper uses a quarter of the backbone's layers.
        num_draws: Draws N from the head in the loss.
        num_posterior_draws: Draws M from the posterior in the loss (the paper: 100); 0 integrates
            the posterior out in closed form.
        alpha: Exponent of the distance, in (0, 2).
        layer_norm_eps: Epsilon of the norms.
    """

    head_type: str = "energy"
    noise_size: int = 64
    num_blocks: int = 2
    num_draws: int = 8
    num_posterior_draws: int = 100
    alpha: float = 1.0
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < 2:
            raise ValueError(f"alpha must lie in (0, 2), got {self.alpha}.")
        if self.num_draws < 2:
            raise ValueError(f"num_draws must be at least 2, got {self.num_draws}.")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be above 0, got {self.layer_norm_eps}.")
        if self.noise_size < 1 or self.num_blocks < 1 or self.num_posterior_draws < 0:
            raise ValueError(
                "noise_size and num_blocks must be at least 1 and num_posterior_draws at least 0, "
                f"got {self.noise_size}, {self.num_blocks} and {self.num_posterior_draws}."
            )

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """See `HeadConfig`."""
        square = hidden_size * hidden_size
        shared = square + self.num_blocks * square
        block = square + square + 2 * square + square  # merge (its draw half), hidden, gate and up, down
        ends = self.noise_size * hidden_size + square + hidden_size * latent_size
        per_draw = self.num_blocks * block + ends
        return HeadFlops.of_forward_pass(shared, per_draw, self.num_draws)


class EnergyNoise(NamedTuple):
    """All randomness of one loss: uniform noise (N, P, U), standard normal noise (M, P, Z)."""

    head: Tensor
    posterior: Tensor | None


class _Block(GradientCheckpointingLayer):
    """x + down(silu(g) * u), where a three-layer network of the draw and the condition outputs (g, u)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=eps)
        self.merge = SlicedLinear(2 * size, size)
        self.hidden = nn.Linear(size, size)
        self.gate_and_up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(size, size)

    def share(self, condition_PD: Tensor) -> Tensor:
        """The part of merge([norm(x); condition]) that all draws of a position share, (P, D)."""
        return F.linear(condition_PD, self.merge.weight.chunk(2, dim=1)[1], self.merge.bias)

    def forward(self, draws_NPD: Tensor, shared_PD: Tensor) -> Tensor:
        draw_weight = self.merge.weight.chunk(2, dim=1)[0]
        merged = F.linear(self.norm(draws_NPD), draw_weight) + shared_PD
        gate, up = self.gate_and_up(F.silu(self.hidden(F.silu(merged)))).chunk(2, dim=-1)
        return draws_NPD + self.down(F.silu(gate) * up)


class EnergyHead(LatentHead):
    """Single-step sampler trained with the energy loss.

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: EnergyHeadConfig

    def __init__(self, config: EnergyHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        eps = config.layer_norm_eps
        self.noise_in = nn.Linear(config.noise_size, hidden_size)
        self.noise_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.condition_in = nn.Linear(hidden_size, hidden_size)
        self.condition_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.blocks = nn.ModuleList(_Block(hidden_size, eps) for _ in range(config.num_blocks))
        self.out_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.out_hidden = nn.Linear(hidden_size, hidden_size)
        self.out = ZeroLinear(hidden_size, latent_size)  # At initialization, all draws are equal.

    def _loss(self, states_PD: Tensor, target: Target, noise: EnergyNoise) -> Tensor:
        """Energy loss of each position, (P,); see `calm.core.energy`."""
        config = self.config
        draws_NPZ = self.sample_latents(states_PD, config.num_draws, noise=noise.head)
        if config.num_posterior_draws == 0:
            return energy_loss_to_gaussian(draws_NPZ, target.posterior_PZ, config.alpha)
        targets_MPZ = target.posterior_PZ.sample(config.num_posterior_draws, noise=noise.posterior)
        return energy_loss(draws_NPZ, targets_MPZ, config.alpha)

    def draw_noise(
        self, num_positions: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> EnergyNoise:
        """See `GenerativeHead`."""
        config = self.config
        head_NPU = uniform(config.num_draws, num_positions, config.noise_size, generator, device) - 0.5
        shape = (config.num_posterior_draws, num_positions, self.latent_size)
        posterior_MPZ = torch.randn(shape, generator=generator, device=device) if shape[0] else None
        return EnergyNoise(head_NPU, posterior_MPZ)

    def prepare(self, states_PD: Tensor) -> Tensor:
        """The condition's contribution to each block, (P, blocks, D)."""
        condition_PD = self.condition_norm(self.condition_in(states_PD))
        return torch.stack([cast(_Block, block).share(condition_PD) for block in self.blocks], dim=1)

    def draw_latents(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """See `LatentHead`; recorded noise is uniform in [-0.5, 0.5], of shape (N, P, U)."""
        if noise is None:
            size, device = self.config.noise_size, prepared_P.device
            noise = uniform(num_draws, prepared_P.shape[0], size, randomness, device) - 0.5
        draws_NPD = self.noise_norm(self.noise_in(noise.to(prepared_P.dtype)))
        for block, shared_PD in zip(self.blocks, prepared_P.unbind(1), strict=True):
            draws_NPD = block(draws_NPD, shared_PD)
        return self.out(F.silu(self.out_hidden(self.out_norm(draws_NPD))))

    def boundary_layers(self) -> list[nn.Module]:
        """See `GenerativeHead`."""
        return [self.noise_in, self.out]
