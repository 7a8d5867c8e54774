"""Flow matching: the straight path, and solvers on fields with known solutions."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from calm.core.flow import CALLS_PER_STEP, solve, straight_path


def test_path_is_straight():
    noise, data = torch.randn(3, 5, 2), torch.randn(3, 5, 2)
    for time in (0.0, 0.25, 1.0):
        point, velocity = straight_path(noise, data, torch.full((3, 5), time))
        assert_close(point, (1 - time) * noise + time * data)
        assert_close(velocity, data - noise)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """dx/dt = (1 + t) x has the solution x_0 exp(t + t²/2); errors fall like (step size)^order."""
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    truth = start * math.exp(1.5)

    def error(steps):
        return (solve(lambda x, t: (1 + t) * x, start, steps, solver) - truth).abs().max().item()

    errors = [error(steps) for steps in (16, 32, 64, 128)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("solver", CALLS_PER_STEP)
def test_number_and_times_of_velocity_calls(solver):
    times = []

    def velocity(x, time):
        times.append(time)
        return torch.ones_like(x)

    end = solve(velocity, torch.zeros(2), 5, solver)
    assert_close(end, torch.ones(2))
    assert len(times) == 5 * CALLS_PER_STEP[solver]
    assert times[0] == 0 and max(times) <= 1 and times == sorted(times)


def test_flow_between_gaussians_reaches_the_data():
    """From N(0, 1) to N(m, s²) the velocity is known: (m + (t s² - (1 - t)) (x - t m) / var_t)."""
    mean, std = 1.5, 0.4

    def velocity(x, time):
        variance = (1 - time) ** 2 + (time * std) ** 2
        return mean + (time * std**2 - (1 - time)) / variance * (x - time * mean)

    start = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = solve(velocity, start, 100, "midpoint")
    assert_close(end, mean + std * start, rtol=0, atol=2e-3)  # The map is linear and increasing.
