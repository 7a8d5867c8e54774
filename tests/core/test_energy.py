"""The energy loss against literal values, closed forms, a plain formula in float64, and Monte Carlo."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from calm.core import energy
from calm.core.energy import energy_loss, energy_loss_to_gaussian, expected_distance
from calm.core.gaussian import DiagonalGaussian


def literal_energy_loss(draws_NPZ, targets_MPZ, alpha):
    """The formula of the docstring, term by term."""
    n, m = len(draws_NPZ), len(targets_MPZ)
    total = torch.zeros(draws_NPZ.shape[1], dtype=draws_NPZ.dtype)
    for i in range(n):
        for j in range(m):
            total += 2 / (n * m) * (draws_NPZ[i] - targets_MPZ[j]).norm(dim=-1) ** alpha
        for k in range(n):
            if k != i:
                total -= 1 / (n * (n - 1)) * (draws_NPZ[i] - draws_NPZ[k]).norm(dim=-1) ** alpha
    return total


def test_hand_computed_value():
    # Draws 0 and 3 on a line, target 1: 2 · (1 + 2)/2 - 3 = 0 for alpha = 1.
    draws, targets = torch.tensor([[[0.0]], [[3.0]]]), torch.tensor([[[1.0]]])
    assert_close(energy_loss(draws, targets), torch.tensor([0.0]))
    # alpha = 1/2: 2 · (1 + sqrt 2)/2 - sqrt 3.
    expected = torch.tensor([1 + math.sqrt(2) - math.sqrt(3)])
    assert_close(energy_loss(draws, targets, alpha=0.5), expected)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 1.5, 1.9])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (8, 16)])
def test_agrees_with_the_formula_in_float64(alpha, n, m):
    generator = torch.Generator().manual_seed(n)
    draws = torch.randn(n, 5, 7, generator=generator)
    targets = 100 + torch.randn(m, 5, 7, generator=generator)  # Far from zero: cancellation would show.
    draws = draws + 100
    reference = literal_energy_loss(draws.double(), targets.double(), alpha)
    assert_close(energy_loss(draws, targets, alpha).double(), reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_gradient_agrees_with_the_formula(alpha):
    draws = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(5, 3, 6, dtype=torch.float64)
    (reference,) = torch.autograd.grad(literal_energy_loss(draws, targets, alpha).sum(), draws)
    (gradient,) = torch.autograd.grad(energy_loss(draws, targets, alpha).sum(), draws)
    assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.25, 0.9, 1.0, 1.8])
def test_gradient_is_finite_where_draws_coincide(alpha):
    draws = torch.zeros(4, 2, 3, requires_grad=True)
    targets = torch.zeros(2, 2, 3)
    targets[1] = 1.0
    energy_loss(draws, targets, alpha).sum().backward()
    assert draws.grad.isfinite().all()
    assert draws.grad.abs().sum() > 0


def test_many_positions_are_handled_in_parts(monkeypatch):
    draws = torch.randn(3, 50, 6, requires_grad=True)
    targets = torch.randn(4, 50, 6)
    expected = energy_loss(draws, targets, 0.7)
    (expected_gradient,) = torch.autograd.grad((expected * torch.arange(50)).sum(), draws)
    monkeypatch.setattr(energy, "_AT_ONCE", 7 * 4 * 6)
    parts = energy_loss(draws, targets, 0.7)
    (gradient,) = torch.autograd.grad((parts * torch.arange(50)).sum(), draws)
    assert_close(parts, expected)
    assert_close(gradient, expected_gradient)


def test_gradient_of_the_targets_agrees_with_the_formula():
    draws, targets = torch.randn(4, 3, 6, requires_grad=True), torch.randn(5, 3, 6, requires_grad=True)
    gradients = torch.autograd.grad(energy_loss(draws, targets).sum(), (draws, targets))
    reference = torch.autograd.grad(literal_energy_loss(draws, targets, 1.0).sum(), (draws, targets))
    for gradient, expected in zip(gradients, reference, strict=True):
        assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_compiled_for_any_number_of_positions():
    """The number of targets differs from batch to batch, and must not cause a recompilation each time."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(energy_loss, backend=counter)
    for positions in range(3, 11):
        draws, targets = torch.randn(4, positions, 6, requires_grad=True), torch.randn(5, positions, 6)
        (gradient,) = torch.autograd.grad(compiled(draws, targets).sum(), draws)
        (reference,) = torch.autograd.grad(energy_loss(draws, targets).sum(), draws)
        assert_close(gradient, reference)
    assert counter.frame_count <= 3


def test_second_derivatives_are_refused():
    draws, targets = torch.randn(4, 3, 6, requires_grad=True), torch.randn(5, 3, 6)
    with pytest.raises(RuntimeError, match="only be differentiated once"):
        torch.autograd.grad(energy_loss(draws, targets).sum(), draws, create_graph=True)


def test_float32_inside_autocast():
    draws, targets = torch.randn(4, 3, 32), torch.randn(9, 3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = energy_loss(draws, targets)
    assert mixed.dtype == torch.float32
    assert_close(mixed, energy_loss(draws, targets))


def exact_expected_distance(points_NPZ, distribution, alpha):
    """E|x - y|^alpha by its Laplace transform (docs/maths.md), in float64.

    E Q^a = a / Gamma(1 - a) * integral of (1 - E exp(-t Q)) t^(-a - 1) dt, by the trapezoid rule in log t,
    which is exact to rounding for such an integrand.
    """
    a, step = alpha / 2, 0.1
    offset = (points_NPZ - distribution.mean).square()
    variance = distribution.variance.expand_as(offset)
    size = (offset + variance).sum(-1).log()
    value = torch.zeros_like(size)
    for number in range(-int(min(600, 40 / (1 - a)) / step), int(40 / a / step)):
        log_t = number * step - size
        doubled = 2 * variance * log_t.exp().unsqueeze(-1)
        log_transform = -(doubled.log1p() / 2 + offset / variance * doubled / 2 / (1 + doubled)).sum(-1)
        value += -torch.expm1(log_transform) * (-a * log_t).exp()
    return value * step * a / math.gamma(1 - a)


def random_distribution(size):
    """A distribution whose deviations span a factor of 10, and points near its mean and far from it."""
    generator = torch.Generator().manual_seed(size)
    mean, spread, direction = torch.randn(3, 4, size, generator=generator, dtype=torch.float64)
    distribution = DiagonalGaussian(mean, torch.special.ndtr(spread) * math.log(10))
    far = torch.tensor([0.0, 0.5, 2.0, 10.0, 50.0]).view(5, 1, 1)
    return mean + far * direction, distribution


def test_reference_for_the_expected_distance_agrees_with_monte_carlo():
    points, distribution = random_distribution(8)
    draws = distribution.sample(20_000, torch.Generator().manual_seed(0)).unsqueeze(1)
    for alpha in (0.5, 1.5):
        distances = (points - draws).norm(dim=-1).double() ** alpha
        error = distances.std(0) / len(distances) ** 0.5
        assert (
            (exact_expected_distance(points, distribution, alpha) - distances.mean(0)).abs() <= 4 * error
        ).all()


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 1.5, 1.9])
@pytest.mark.parametrize(
    ("size", "tolerance"), [(1, 0.3), (2, 0.1), (8, 3e-2), (32, 4e-3), (128, 2e-4)], ids=str
)
def test_expected_distance_within_its_bound(alpha, size, tolerance):
    points, distribution = random_distribution(size)
    exact = exact_expected_distance(points, distribution, alpha)
    offset = (points - distribution.mean).square()
    mean = (offset + distribution.variance).sum(-1)
    error = (exact - expected_distance(points, distribution, alpha)) / mean ** (alpha / 2)
    assert (error.abs() <= tolerance).all()
    # The bounds of docs/maths.md, from the cumulants of the squared distance.
    second, third, fourth = (
        factor * (distribution.variance**n + n * distribution.variance ** (n - 1) * offset).sum(-1) / mean**n
        for n, factor in ((2, 2), (3, 8), (4, 48))
    )
    a = alpha / 2
    upper = a * (1 - a) * (2 - a) / 6 * third
    lower = upper - (1 - a) * (2 - a) * (3 - a) / 6 * (3 * second**2 + fourth)
    assert ((lower - 1e-9 <= error) & (error <= upper + 1e-9)).all()
    share = distribution.variance.amax(-1) / mean
    assert (error.abs() <= 8 * (1 - a) * (2 - a) * (3 - a) * share**2 * (1 + 4 * share) + 1e-9).all()


def test_expected_distance_without_variance_is_the_distance():
    distribution = DiagonalGaussian(torch.randn(5, 6), torch.full((5, 6), -20.0))
    points = torch.randn(2, 5, 6)
    assert_close(expected_distance(points, distribution), (points - distribution.mean).norm(dim=-1))


def test_closed_form_is_the_limit_of_many_posterior_draws():
    distribution = DiagonalGaussian(torch.randn(3, 64), torch.full((3, 64), -1.0))
    draws = torch.randn(8, 3, 64)
    monte_carlo = energy_loss(draws, distribution.sample(20_000, torch.Generator().manual_seed(0)))
    assert_close(energy_loss_to_gaussian(draws, distribution), monte_carlo, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("alpha", [0.0, 2.0, -1.0, 3.0])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must lie in"):
        energy_loss(torch.zeros(2, 1, 1), torch.zeros(1, 1, 1), alpha)


def test_single_draw_is_refused():
    with pytest.raises(ValueError, match="at least 2 draws"):
        energy_loss(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
