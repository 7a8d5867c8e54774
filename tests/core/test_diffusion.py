"""Diffusion against closed forms: the posterior, the bound, and samplers on Gaussian data."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from calm.core.diffusion import (
    Coefficients,
    NoiseSchedule,
    data_from_noise,
    hybrid_loss,
    log_variance,
    sample,
)

WHOLE = NoiseSchedule.cosine(1000)
TABLE = WHOLE.table()


def look_up(*steps: int) -> Coefficients:
    return Coefficients.look_up(TABLE, torch.tensor([steps]))


def test_the_cosine_schedule():
    signals = WHOLE.signals
    assert len(signals) == 1000 and all(a > b for a, b in itertools.pairwise(signals))
    first, middle = (math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500))
    assert signals[499] == pytest.approx(middle / first, rel=1e-9)
    assert 1 - signals[-1] / signals[-2] == pytest.approx(0.999)


def test_respacing_keeps_the_ends():
    few = WHOLE.respaced(10)
    assert few.steps == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    assert few.signals == tuple(WHOLE.signals[step] for step in few.steps)
    assert WHOLE.respaced(1).steps == (999,) and WHOLE.respaced(1000) == WHOLE
    with pytest.raises(ValueError, match="between 1 and 1000, got 1001"):
        WHOLE.respaced(1001)


def test_steps_with_enough_signal():
    some = WHOLE.with_signal(0.01)
    assert some.signals[-1] >= 0.01 > WHOLE.signals[len(some.signals)]
    assert some.steps == tuple(range(len(some.signals)))


@pytest.mark.parametrize("schedule", [WHOLE, WHOLE.respaced(25)])
def test_posterior_mean_and_variance(schedule):
    """x_{t-1} given x_t and x_0, from Bayes' rule for Gaussians (precisions add up)."""
    for index in (1, 7, 24):
        step = schedule.at(index)
        now, before = schedule.signals[index], schedule.signals[index - 1]
        kept, beta = now / before, 1 - now / before
        precision = 1 / (1 - before) + kept / beta
        data, point = 0.8, -0.3
        mean = (math.sqrt(before) * data / (1 - before) + math.sqrt(kept) * point / beta) / precision
        assert step.data_weight * data + step.point_weight * point == pytest.approx(mean)
        assert math.exp(step.min_log_variance) == pytest.approx(1 / precision)
        assert math.exp(step.max_log_variance) == pytest.approx(beta)
    assert schedule.at(0).min_log_variance == schedule.at(1).min_log_variance  # Nothing is added at t = 0.


def test_the_table_holds_every_step():
    step = look_up(0, 7, 999)
    for place, index in enumerate((0, 7, 999)):
        row = [value[0, place, 0].item() for value in step]
        assert row == pytest.approx(list(WHOLE.at(index)), rel=1e-6)


def test_a_table_made_without_gradients_can_have_them():
    with torch.inference_mode():
        table = NoiseSchedule.cosine(10).table()
    x = torch.ones(1, 1, 1, requires_grad=True)
    (Coefficients.look_up(table, torch.tensor([[3]])).signal * x).sum().backward()
    assert x.grad.item() == pytest.approx(NoiseSchedule.cosine(10).at(3).signal)


def test_noise_and_data_are_two_views_of_a_point():
    step = look_up(3, 400, 900)
    data, noise = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    point = step.signal * data + step.noise * noise
    assert_close(data_from_noise(step, point, noise), data, rtol=1e-4, atol=1e-4)


def test_the_bound_is_the_divergence_of_gaussians():
    """Against torch.distributions, in bits a dimension."""
    step = look_up(5, 300, 998)
    data, noise, fraction = (torch.randn(1, 3, 4) for _ in range(3))
    predicted = noise + 0.1 * torch.randn(1, 3, 4)
    point = step.signal * data + step.noise * noise
    guess = data_from_noise(step, point, predicted)
    spread = (0.5 * log_variance(step, fraction)).exp()
    truth = torch.distributions.Normal(
        step.data_weight * data + step.point_weight * point, (0.5 * step.min_log_variance).exp()
    )
    model = torch.distributions.Normal(step.data_weight * guess + step.point_weight * point, spread)
    bits = torch.distributions.kl_divergence(truth, model).mean(-1) / math.log(2)
    expected = (predicted - noise).square().mean(-1) + bits
    never = torch.zeros(1, 3, dtype=torch.bool)
    loss = hybrid_loss(step, never, data, noise, point, predicted, fraction)
    assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_the_first_step_has_a_likelihood():
    step = look_up(0)
    data, noise, predicted, fraction = (0.5 * torch.randn(1, 1, 4) for _ in range(4))
    point = step.signal * data + step.noise * noise
    mean = step.data_weight * data_from_noise(step, point, predicted) + step.point_weight * point
    distribution = torch.distributions.Normal(mean, (0.5 * log_variance(step, fraction)).exp())
    first = torch.ones(1, 1, dtype=torch.bool)
    squared = (predicted - noise).square().mean(-1)
    density = hybrid_loss(step, first, data, noise, point, predicted, fraction)
    assert_close(density, squared - distribution.log_prob(data).mean(-1) / math.log(2), rtol=1e-4, atol=1e-4)
    image = hybrid_loss(step, first, data, noise, point, predicted, fraction, as_image=True)
    mass = (distribution.cdf(data + 1 / 255) - distribution.cdf(data - 1 / 255)).clamp_min(1e-12)
    # The released code approximates the normal distribution by a tanh, which is off in the tails.
    assert_close(image, squared - mass.log().mean(-1) / math.log(2), rtol=0, atol=0.1)


def test_the_bound_trains_the_variance_alone():
    step = look_up(500)
    data, noise = torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    point = step.signal * data + step.noise * noise
    predicted = (noise + 0.3).requires_grad_()
    fraction = torch.zeros(1, 1, 4, requires_grad=True)
    loss = hybrid_loss(step, torch.zeros(1, 1, dtype=torch.bool), data, noise, point, predicted, fraction)
    loss.sum().backward()
    assert_close(predicted.grad, 2 * (predicted.detach() - noise) / 4)  # That of the squared error.
    assert (fraction.grad != 0).all()


MEAN, STD = 1.2, 0.5


def predict(schedule):
    """For data N(1.2, 0.5²): the best prediction of the noise, and the variance of x_{t-1} given x_t."""
    index_of = {step: index for index, step in enumerate(schedule.steps)}

    def call(point, step):
        index = index_of[step]
        signal = schedule.signals[index]
        variance = signal * STD**2 + 1 - signal
        noise = math.sqrt(1 - signal) / variance * (point - math.sqrt(signal) * MEAN)
        now = schedule.at(index)
        # Of x_{t-1}: what is left of x_0, seen through its weight, and the variance given x_0.
        of_data = STD**2 * (1 - signal) / variance
        least = math.exp(now.min_log_variance) if index else 0.0
        true = math.log(now.data_weight**2 * of_data + least)
        fraction = 2 * (true - now.min_log_variance) / (now.max_log_variance - now.min_log_variance) - 1
        return noise, torch.full_like(point, fraction)

    return call


@pytest.mark.parametrize("num_steps", [8, 200])
def test_ancestral_sampling_draws_the_data(num_steps):
    """With the true variance of every step few steps draw the distribution, but for the last variance."""
    schedule = WHOLE.respaced(num_steps)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, generator=generator, dtype=torch.float64)
    noise = lambda _: torch.randn(20_000, generator=generator, dtype=torch.float64)  # noqa: E731
    drawn = sample(schedule, predict(schedule), start, "ancestral", noise)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(20_000))
    assert drawn.std().item() == pytest.approx(STD, rel=0.02)

    def least_variance(point, step):
        return predict(schedule)(point, step)[0], torch.full_like(point, -1.0)

    narrow = sample(schedule, least_variance, start, "ancestral", noise)
    if num_steps == 8:  # The variance matters: the least one gives too narrow a distribution.
        assert narrow.std().item() < 0.95 * STD


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
    points = []

    def wild(point, step):
        points.append(point)
        return torch.full_like(point, -30.0), torch.zeros_like(point)

    for sampler in ("ancestral", "ddim", "dpm"):
        drawn = sample(schedule, wild, torch.zeros(100), sampler, lambda _: torch.zeros(100), bound=2.0)
        assert drawn.abs().max() <= 2.0
    assert max(point.abs().max() for point in points) <= 4.0
