"""The coincidence test of the exact sampler, against reading draw by draw, and Sibuya lifetimes."""

import math

import pytest
import torch
from scipy import stats

from calm.core.coincidence import find_accepted, sibuya_lifetimes


def read_draw_by_draw(numbers, n, lifetimes=None):
    """Outcome and number of draws read, or (None, None), straight from the definition."""
    start = 0
    while True:
        first = numbers[start] if start < len(numbers) else None
        for index in range(start, start + n):
            if index >= len(numbers):
                return None, None
            if numbers[index] != first:
                start = index + 1
                break
        else:
            end = start + n
            if lifetimes is None:
                return first, end
            for index in range(end, end + lifetimes[start]):
                if index >= len(numbers):
                    return None, None
                if numbers[index] == first:
                    return first, index + 1
            start = end + lifetimes[start]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("with_lifetimes", [False, True])
@pytest.mark.parametrize("num_outcomes", [1, 2, 6])
def test_same_winner_as_reading_draw_by_draw(n, with_lifetimes, num_outcomes):
    generator = torch.Generator().manual_seed(n)
    decided = 0
    for length in range(1, 25):
        # One outcome is common, so that five in a row occur.
        numbers_RN = torch.randint(-num_outcomes, num_outcomes, (40, length), generator=generator).clamp_min(
            0
        )
        lifetimes_RN = torch.randint(1, 6, (40, length), generator=generator) if with_lifetimes else None
        winner_R, needed_R = find_accepted(numbers_RN, n, lifetimes_RN)
        for row, numbers in enumerate(numbers_RN.tolist()):
            lifetimes = lifetimes_RN[row].tolist() if with_lifetimes else None
            outcome, needed = read_draw_by_draw(numbers, n, lifetimes)
            if outcome is None:
                assert winner_R[row] == needed_R[row] == -1
            else:
                decided += 1
                assert (numbers[winner_R[row]], int(needed_R[row])) == (outcome, needed)
    assert decided > 30


@pytest.mark.parametrize("a", [0.1, 0.5, 0.9])
def test_lifetimes_have_the_sibuya_distribution(a):
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    observed = torch.bincount(sibuya_lifetimes(uniform, a, 6), minlength=8)[1:]
    survival = [math.prod(1 - a / i for i in range(1, k + 1)) for k in range(7)]
    distribution = [survival[k] - survival[k + 1] for k in range(6)] + [survival[6]]
    assert (
        stats.chisquare(observed.numpy(), torch.tensor(distribution, dtype=torch.float64) * 1e5).pvalue > 1e-3
    )


@pytest.mark.parametrize(("a", "p"), [(0.3, 0.5), (0.7, 0.2), (0.5, 0.9)])
def test_candidate_is_accepted_with_probability_p_to_the_a(a, p):
    """Sum over lifetimes of P(L = k) · (1 - (1-p)^k) = p^a, with the lifetimes of the sampler."""
    longest = 4000
    grid = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    lifetimes = sibuya_lifetimes(grid, a, longest).double()
    assert (1 - (1 - p) ** lifetimes).mean().item() == pytest.approx(p**a, abs=2e-5)
