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

SCHEDULE = NoiseSchedule.cosine(1000)
TABLE = SCHEDULE.table()


def look_up(*steps: int) -> Coefficients:
    return Coefficients.look_up(TABLE, torch.tensor([steps]))


def test_cosine_schedule():
    signals = SCHEDULE.signals
    assert len(signals) == 1000 and all(a > b for a, b in itertools.pairwise(signals))
    first, middle = (math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500))
    assert signals[499] == pytest.approx(middle / first, rel=1e-9)
    assert 1 - signals[-1] / signals[-2] == pytest.approx(0.999)


def test_respacing_keeps_the_ends():
    respaced = SCHEDULE.respaced(10)
    assert respaced.steps == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    assert respaced.signals == tuple(SCHEDULE.signals[step] for step in respaced.steps)
    assert SCHEDULE.respaced(1).steps == (999,) and SCHEDULE.respaced(1000) == SCHEDULE
    with pytest.raises(ValueError, match="between 1 and 1000, got 1001"):
        SCHEDULE.respaced(1001)


def test_schedule_is_cut_where_the_signal_is_too_weak():
    cut = SCHEDULE.with_signal(0.01)
    assert cut.signals[-1] >= 0.01 > SCHEDULE.signals[len(cut.signals)]
    assert cut.steps == tuple(range(len(cut.signals)))


@pytest.mark.parametrize("schedule", [SCHEDULE, SCHEDULE.respaced(25)])
def test_posterior_mean_and_variance(schedule):
    """x_{t-1} given x_t and x_0, from Bayes' rule for Gaussians (precisions add up)."""
    for index in (1, 7, 24):
        step = schedule.at(index)
        now, before = schedule.signals[index], schedule.signals[index - 1]
        alpha, beta = now / before, 1 - now / before
        precision = 1 / (1 - before) + alpha / beta
        data, point = 0.8, -0.3
        mean = (math.sqrt(before) * data / (1 - before) + math.sqrt(alpha) * point / beta) / precision
        assert step.data_weight * data + step.point_weight * point == pytest.approx(mean)
        assert math.exp(step.min_log_variance) == pytest.approx(1 / precision)
        assert math.exp(step.max_log_variance) == pytest.approx(beta)
    assert schedule.at(0).min_log_variance == schedule.at(1).min_log_variance  # Nothing is added at t = 0.


def test_table_holds_every_step():
    step = look_up(0, 7, 999)
    for column, index in enumerate((0, 7, 999)):
        row = [value[0, column, 0].item() for value in step]
        assert row == pytest.approx(list(SCHEDULE.at(index)), rel=1e-6)


def test_table_made_in_inference_mode_works_with_autograd():
    with torch.inference_mode():
        table = NoiseSchedule.cosine(10).table()
    x = torch.ones(1, 1, 1, requires_grad=True)
    (Coefficients.look_up(table, torch.tensor([[3]])).signal * x).sum().backward()
    assert x.grad.item() == pytest.approx(NoiseSchedule.cosine(10).at(3).signal)


def test_data_are_recovered_from_the_noise():
    step = look_up(3, 400, 900)
    data, noise = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    point = step.signal * data + step.noise * noise
    assert_close(data_from_noise(step, point, noise), data, rtol=1e-4, atol=1e-4)


def test_variational_bound_is_the_divergence_of_gaussians():
    """Against torch.distributions, in bits a dimension."""
    step = look_up(5, 300, 998)
    data, noise, fraction = (torch.randn(1, 3, 4) for _ in range(3))
    predicted = noise + 0.1 * torch.randn(1, 3, 4)
    point = step.signal * data + step.noise * noise
    predicted_data = data_from_noise(step, point, predicted)
    std = (0.5 * log_variance(step, fraction)).exp()
    truth = torch.distributions.Normal(
        step.data_weight * data + step.point_weight * point, (0.5 * step.min_log_variance).exp()
    )
    model = torch.distributions.Normal(step.data_weight * predicted_data + step.point_weight * point, std)
    bits = torch.distributions.kl_divergence(truth, model).mean(-1) / math.log(2)
    expected = (predicted - noise).square().mean(-1) + bits
    is_first = torch.zeros(1, 3, dtype=torch.bool)
    loss = hybrid_loss(step, is_first, data, noise, point, predicted, fraction)
    assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_first_step_is_scored_by_its_likelihood():
    step = look_up(0)
    data, noise, predicted, fraction = (0.5 * torch.randn(1, 1, 4) for _ in range(4))
    point = step.signal * data + step.noise * noise
    mean = step.data_weight * data_from_noise(step, point, predicted) + step.point_weight * point
    distribution = torch.distributions.Normal(mean, (0.5 * log_variance(step, fraction)).exp())
    is_first = torch.ones(1, 1, dtype=torch.bool)
    squared_error = (predicted - noise).square().mean(-1)
    loss = hybrid_loss(step, is_first, data, noise, point, predicted, fraction)
    bits = -distribution.log_prob(data).mean(-1) / math.log(2)
    assert_close(loss, squared_error + bits, rtol=1e-4, atol=1e-4)
    image_loss = hybrid_loss(step, is_first, data, noise, point, predicted, fraction, as_image=True)
    mass = (distribution.cdf(data + 1 / 255) - distribution.cdf(data - 1 / 255)).clamp_min(1e-12)
    # The released code approximates the normal distribution by a tanh, which is off in the tails.
    assert_close(image_loss, squared_error - mass.log().mean(-1) / math.log(2), rtol=0, atol=0.1)


def test_variational_bound_trains_only_the_variance():
    step = look_up(500)
    data, noise = torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    point = step.signal * data + step.noise * noise
    predicted = (noise + 0.3).requires_grad_()
    fraction = torch.zeros(1, 1, 4, requires_grad=True)
    loss = hybrid_loss(step, torch.zeros(1, 1, dtype=torch.bool), data, noise, point, predicted, fraction)
    loss.sum().backward()
    assert_close(predicted.grad, 2 * (predicted.detach() - noise) / 4)  # From the squared error alone.
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
        # Var[x_{t-1} | x_t] by the law of total variance, with data_variance = Var[x_0 | x_t].
        data_variance = STD**2 * (1 - signal) / variance
        min_variance = math.exp(now.min_log_variance) if index else 0.0
        true_log_variance = math.log(now.data_weight**2 * data_variance + min_variance)
        fraction = (
            2 * (true_log_variance - now.min_log_variance) / (now.max_log_variance - now.min_log_variance) - 1
        )
        return noise, torch.full_like(point, fraction)

    return call


@pytest.mark.parametrize("num_steps", [8, 200])
def test_ancestral_sampling_has_the_distribution_of_the_data(num_steps):
    """With the true variance of each step, few steps suffice, although the last one adds no noise."""
    schedule = SCHEDULE.respaced(num_steps)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, generator=generator, dtype=torch.float64)
    noise = lambda _: torch.randn(20_000, generator=generator, dtype=torch.float64)  # noqa: E731
    drawn = sample(schedule, predict(schedule), start, "ancestral", noise)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(20_000))
    assert drawn.std().item() == pytest.approx(STD, rel=0.02)

    def predict_min_variance(point, step):
        return predict(schedule)(point, step)[0], torch.full_like(point, -1.0)

    narrow = sample(schedule, predict_min_variance, start, "ancestral", noise)
    if num_steps == 8:  # The variance matters: with the lower bound the distribution is too narrow.
        assert narrow.std().item() < 0.95 * STD


def test_order_of_the_deterministic_samplers():
    """The map from noise to data is exactly linear here, data = 1.2 + 0.5 noise for T to infinity."""
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(sampler, steps):
        schedule = SCHEDULE.respaced(steps)
        drawn = sample(schedule, predict(schedule), start, sampler, lambda _: start)
        return (drawn - (MEAN + STD * start)).abs().max().item()

    ddim, dpm = ([error(sampler, steps) for steps in (10, 20, 40, 80)] for sampler in ("ddim", "dpm"))
    for coarse, fine in itertools.pairwise(ddim):
        assert 1.5 < coarse / fine < 3  # First order: half the step, half the error.
    for first, second in zip(ddim, dpm, strict=True):
        assert second < first / 2
    assert dpm[1] < 0.01 < ddim[1] / 5


def test_samples_stay_within_the_bound():
    schedule = SCHEDULE.respaced(10)
    points = []

    def wild(point, step):
        points.append(point)
        return torch.full_like(point, -30.0), torch.zeros_like(point)

    for sampler in ("ancestral", "ddim", "dpm"):
        drawn = sample(schedule, wild, torch.zeros(100), sampler, lambda _: torch.zeros(100), bound=2.0)
        assert drawn.abs().max() <= 2.0
    assert max(point.abs().max() for point in points) <= 4.0
