"""The diagonal Gaussian against torch.distributions."""

import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from calm.core.gaussian import DiagonalGaussian, floored_kl


def test_kl_agrees_with_torch_distributions():
    distribution = DiagonalGaussian(torch.randn(5, 7), torch.randn(5, 7))
    expected = kl_divergence(Normal(distribution.mean, distribution.std), Normal(0.0, 1.0))
    assert_close(distribution.kl_to_standard_normal(), expected)


def test_kl_below_the_floor_counts_as_the_floor_and_has_no_gradient():
    mean = torch.tensor([[0.0, 2.0]], requires_grad=True)  # KL 0 and 2.
    kl = floored_kl(DiagonalGaussian(mean, torch.zeros(1, 2)), floor=0.5)
    assert_close(kl.detach(), torch.tensor([2.5]))
    kl.sum().backward()
    assert_close(mean.grad, torch.tensor([[0.0, 2.0]]))


def test_samples_have_the_mean_and_deviation_and_follow_the_generator():
    distribution = DiagonalGaussian(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, -1.0]]))
    draws = distribution.sample(100_000, torch.Generator().manual_seed(0))
    assert_close(draws.mean(0), distribution.mean, atol=0.02, rtol=0)
    assert_close(draws.std(0), distribution.std, atol=0.02, rtol=0)
    assert (
        distribution.sample(3, torch.Generator().manual_seed(1))
        == distribution.sample(3, torch.Generator().manual_seed(1))
    ).all()
