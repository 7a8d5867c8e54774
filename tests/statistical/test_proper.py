"""The energy loss is lowest, in expectation, at the true distribution; a mean-squared error is not."""

import pytest
import torch

from calm.core.energy import energy_loss

NUM_POSITIONS = 60_000


def two_modes(num_draws, weight, spread, generator):
    """Draws of a mixture of two normal distributions at -1 and +1, shape (draws, positions, 1)."""
    shape = (num_draws, NUM_POSITIONS, 1)
    side = (torch.rand(shape, generator=generator) < weight).float() * 2 - 1
    return side + spread * torch.randn(shape, generator=generator)


def losses(weight, spread, targets, alpha):
    """Loss of every position; the same randomness for every distribution, so that they compare in pairs."""
    draws = two_modes(4, weight, spread, torch.Generator().manual_seed(9))
    return energy_loss(draws, targets, alpha).double()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(
    ("weight", "spread"),
    [(0.5, 0.3), (0.9, 0.3), (0.7, 0.6), (0.7, 0.05), (1.0, 0.3), (0.0, 0.3)],
)
def test_any_other_distribution_scores_worse(alpha, weight, spread):
    targets = two_modes(1, 0.7, 0.3, torch.Generator().manual_seed(7))
    excess = losses(weight, spread, targets, alpha) - losses(0.7, 0.3, targets, alpha)
    assert excess.mean() > 3 * excess.std() / NUM_POSITIONS**0.5


def test_mean_scores_worse_despite_its_lower_squared_error():
    generator = torch.Generator().manual_seed(8)
    targets = two_modes(1, 0.7, 0.3, generator)
    draws = two_modes(4, 0.7, 0.3, generator)
    mean = torch.full_like(draws, 0.4)
    assert energy_loss(mean, targets).mean() > energy_loss(draws, targets).mean() + 0.1
    assert (mean - targets).square().mean() < (draws - targets).square().mean()
