"""The diagonal Gaussian posterior of the autoencoder over latents.

Shapes: P positions (any number of leading axes), Z latent size, M draws.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal distributions, one for each latent dimension.

    Args:
        mean: Means, shape (P, Z).
        log_std: Natural logarithms of the standard deviations, shape (P, Z).
    """

    mean: Tensor
    log_std: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviations, shape (P, Z)."""
        return self.log_std.exp()

    @property
    def variance(self) -> Tensor:
        """Variances, shape (P, Z)."""
        return (2 * self.log_std).exp()

    def sample(
        self, num_draws: int, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Sample latents with the reparameterization trick, shape (M, P, Z).

        Args:
            num_draws: Number of independent draws M.
            generator: Source of the noise; the default generator if None.
            noise: Standard normal noise of shape (M, P, Z) to use instead of sampling it.
        """
        if noise is None:
            noise = torch.randn(
                (num_draws, *self.mean.shape),
                generator=generator,
                device=self.mean.device,
                dtype=self.mean.dtype,
            )
        return self.mean + self.std * noise

    def kl_to_standard_normal(self) -> Tensor:
        """KL(self || N(0, 1)) of each dimension in nats, shape (P, Z)."""
        return 0.5 * (self.mean.square() + self.variance - 1) - self.log_std

    def __getitem__(self, index: Any) -> "DiagonalGaussian":
        """Select positions, as a tensor would."""
        return DiagonalGaussian(self.mean[index], self.log_std[index])


def floored_kl(posterior: DiagonalGaussian, floor: float) -> Tensor:
    """KL to the standard normal with a floor on each dimension, summed over dimensions, shape (P,).

    A dimension below the floor gets no gradient, so the KL term cannot make it collapse
    ("KL clipping", paper section 2.2).

    Args:
        posterior: Gaussian of shape (P, Z).
        floor: Minimum KL counted for each dimension, in nats.
    """
    return posterior.kl_to_standard_normal().clamp_min(floor).sum(-1)
