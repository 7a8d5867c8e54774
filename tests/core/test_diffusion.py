"""Diffusion against closed forms: the posterior, the bound, and samplers on Gaussian data."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from calm.core.diffusion import NoiseSchedule, data_from_noise, hybrid_loss, log_variance, sample

WHOLE = NoiseSchedule.cosine(1000)


def test_the_cosine_schedule():
    signals = WHOLE.signals
    assert len(signals) == 1000 and (signals.diff() < 0).all()
    middle = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500)]
    assert signals[499].item() == pytest.approx(middle[1] / middle[0], rel=1e-9)
    assert (1 - signals[-1] / signals[-2]).item() == pytest.approx(0.999)


def test_respacing_keeps_the_ends():
    few = WHOLE.respaced(10)
    assert few.steps == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    assert_close(few.signals, WHOLE.signals[list(few.steps)])
    assert WHOLE.respaced(1).steps == (999,) and WHOLE.respaced(1000).steps == WHOLE.steps
    with pytest.raises(ValueError, match=r"1\.\.1000, got 1001"):
        WHOLE.respaced(1001)


@pytest.mark.parametrize("schedule", [WHOLE, WHOLE.respaced(25)])
def test_posterior_mean_and_variance(schedule):
    """x_{t-1} given x_t and x_0, from Bayes' rule for Gaussians (precisions add up)."""
    for index in (1, 7, 24):
        step = schedule.at(index)
        now, before = schedule.signals[index], schedule.signals[index - 1]
        kept, beta = now / before, 1 - now / before
        precision = 1 / (1 - before) + kept / beta
        data, point = 0.8, -0.3
        mean = (before.sqrt() * data / (1 - before) + kept.sqrt() * point / beta) / precision
        assert (step.of_data * data + step.of_point * point).item() == pytest.approx(mean.item(), rel=1e-5)
        assert step.least.exp().item() == pytest.approx((1 / precision).item(), rel=1e-5)
        assert step.most.exp().item() == pytest.approx(beta.item(), rel=1e-5)


def test_noise_and_data_are_two_views_of_a_point():
    step = WHOLE.at(torch.tensor([[3, 400, 900]]))
    data, noise = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    point = step.signal * data + step.noise * noise
    assert_close(data_from_noise(step, point, noise), data, rtol=1e-4, atol=1e-4)


def test_the_bound_is_the_divergence_of_gaussians():
    """Against torch.distributions, in bits a dimension."""
    index = torch.tensor([[5, 300, 998]])
    step = WHOLE.at(index)
    data, noise, fraction = (torch.randn(1, 3, 4) for _ in range(3))
    predicted = noise + 0.1 * torch.randn(1, 3, 4)
    point = step.signal * data + step.noise * noise
    guess = data_from_noise(step, point, predicted)
    spread = (0.5 * log_variance(step, fraction)).exp()
    truth = torch.distributions.Normal(step.of_data * data + step.of_point * point, (0.5 * step.least).exp())
    model = torch.distributions.Normal(step.of_data * guess + step.of_point * point, spread)
    bits = torch.distributions.kl_divergence(truth, model).mean(-1) / math.log(2)
    expected = (predicted - noise).square().mean(-1) + bits
    never = torch.zeros(1, 3, dtype=torch.bool)
    assert_close(hybrid_loss(step, never, data, noise, predicted, fraction), expected, rtol=1e-4, atol=1e-5)


def test_the_first_step_has_a_likelihood():
    step = WHOLE.at(torch.zeros(1, 1, dtype=torch.long))
    data, noise, predicted, fraction = (0.5 * torch.randn(1, 1, 4) for _ in range(4))
    point = step.signal * data + step.noise * noise
    mean = step.of_data * data_from_noise(step, point, predicted) + step.of_point * point
    law = torch.distributions.Normal(mean, (0.5 * log_variance(step, fraction)).exp())
    first = torch.ones(1, 1, dtype=torch.bool)
    squared = (predicted - noise).square().mean(-1)
    density = hybrid_loss(step, first, data, noise, predicted, fraction)
    assert_close(density, squared - law.log_prob(data).mean(-1) / math.log(2), rtol=1e-4, atol=1e-4)
    image = hybrid_loss(step, first, data, noise, predicted, fraction, as_image=True)
    mass = (law.cdf(data + 1 / 255) - law.cdf(data - 1 / 255)).clamp_min(1e-12)
    # The released code approximates the normal distribution by a tanh, which is off in the tails.
    assert_close(image, squared - mass.log().mean(-1) / math.log(2), rtol=0, atol=0.1)


def test_the_bound_trains_the_variance_alone():
    step = WHOLE.at(torch.full((1, 1), 500))
    data, noise = torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    predicted, fraction = noise.clone().requires_grad_(), torch.zeros(1, 1, 4, requires_grad=True)
    hybrid_loss(step, torch.zeros(1, 1, dtype=torch.bool), data, noise, predicted, fraction).sum().backward()
    assert (predicted.grad == 0).all() and (fraction.grad != 0).all()


MEAN, STD = 1.2, 0.5


def predict(schedule):
    """The best prediction of the noise where data are N(1.2, 0.5²), and the true backward variance."""
    by_step = dict(zip(schedule.steps, schedule.signals.tolist(), strict=True))

    def call(point, step):
        signal = by_step[step]
        variance = signal * STD**2 + 1 - signal
        noise = math.sqrt(1 - signal) / variance * (point - math.sqrt(signal) * MEAN)
        return noise, torch.full_like(point, 1.0)

    return call


def test_ancestral_sampling_draws_the_data():
    schedule = WHOLE.respaced(200)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, generator=generator)
    drawn = sample(
        schedule, predict(schedule), start, "ancestral", lambda _: torch.randn(20_000, generator=generator)
    )
    assert drawn.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(20_000) + 0.01)
    assert drawn.std().item() == pytest.approx(STD, rel=0.05)


def test_order_of_the_deterministic_samplers():
    """The map from noise to data is exactly linear here, data = 1.2 + 0.5 noise for T to infinity."""
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(sampler, steps):
        schedule = WHOLE.respaced(steps)
        drawn = sample(schedule, predict(schedule), start, sampler, lambda _: start)
        return (drawn - (MEAN + STD * start)).abs().max().item()

    ddim, dpm = ([error(sampler, steps) for steps in (10, 20, 40, 80)] for sampler in ("ddim", "dpm"))
    for coarse, fine in itertools.pairwise(ddim):
        assert 1.5 < coarse / fine < 3  # First order: half the step, half the error.
    for first, second in zip(ddim, dpm, strict=True):
        assert second < first / 2
    assert dpm[1] < 0.01 < ddim[1] / 5


def test_the_bound_of_data_holds():
    schedule = WHOLE.respaced(10)
    wild = lambda point, step: (torch.full_like(point, -3.0), torch.zeros_like(point))  # noqa: E731
    for sampler in ("ancestral", "ddim", "dpm"):
        drawn = sample(schedule, wild, torch.randn(100), sampler, lambda _: torch.randn(100), bound=2.0)
        assert drawn.abs().max() < 2.5
