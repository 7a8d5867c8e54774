"""The pool rule against enumeration and hand-computed weights."""

import math

import pytest
import torch
from scipy import stats

from calm.core.temperature import inverse_temperature, sample_from_pool


def pool_of(counts, chunk_size=3):
    """A pool with so many copies of the chunks (i, i, ..., i), one row."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ids[:, None, None].expand(-1, 1, chunk_size)


def frequencies(pool_NRK, temperature, num_outcomes, repeats=40_000, seed=0):
    repeated = pool_NRK.expand(-1, repeats, -1)
    chosen = sample_from_pool(repeated, temperature, torch.Generator().manual_seed(seed))
    return torch.bincount(chosen[:, 0], minlength=num_outcomes)


@pytest.mark.parametrize(
    ("counts", "temperature", "weights"),
    [
        ([3, 2], 1 / 2, [3, 1]),  # C(3,2) and C(2,2): the example of the paper.
        ([4, 3, 1], 1 / 3, [4, 1, 0]),
        ([1, 1, 1], 1 / 2, [1, 1, 1]),  # No pair: the rule falls back to m = 1.
        ([2, 2, 1, 1], 1 / 4, [1, 1, 0, 0]),  # No four, no three: m = 2.
        ([5, 3], 1.0, [5, 3]),
    ],
)
def test_weights_of_the_pool_rule(counts, temperature, weights):
    observed = frequencies(pool_of(counts), temperature, len(counts))
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert (observed[expected == 0] == 0).all()
    kept = expected > 0
    expected_counts = (expected[kept] * observed.sum()).numpy()
    assert stats.chisquare(observed[kept].numpy(), expected_counts).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1 / 2, 1 / 3])
def test_tends_to_the_tempered_law(temperature):
    law = torch.tensor([0.4, 0.3, 0.2, 0.1])
    tempered = law ** (1 / temperature) / (law ** (1 / temperature)).sum()
    distances = []
    for size in (6, 200):
        generator = torch.Generator().manual_seed(size)
        draws = torch.multinomial(law.expand(20_000, -1), size, replacement=True, generator=generator)
        pool = draws.T.unsqueeze(-1).expand(-1, -1, 2)
        chosen = sample_from_pool(pool, temperature, generator)[:, 0]
        observed = torch.bincount(chosen, minlength=4) / len(chosen)
        distances.append(0.5 * (observed - tempered).abs().sum().item())
    assert distances[1] < 0.02
    assert distances[1] < distances[0]


def test_chunks_are_compared_by_all_ids():
    # The same first token everywhere; only the last differs: no two draws are equal but the pair.
    pool = torch.tensor([[5, 1], [5, 2], [5, 3], [5, 3]]).unsqueeze(1)
    chosen = sample_from_pool(pool.expand(-1, 500, -1), 0.5, torch.Generator().manual_seed(0))
    assert (chosen == torch.tensor([5, 3])).all()


def test_rows_do_not_mix():
    pool = torch.arange(6)[None, :, None].expand(10, -1, 4)
    chosen = sample_from_pool(pool, 0.5, torch.Generator().manual_seed(0))
    assert (chosen[:, 0] == torch.arange(6)).all()


def test_same_seed_same_choice():
    pool = torch.randint(3, (50, 20, 2))
    first, second = (sample_from_pool(pool, 0.5, torch.Generator().manual_seed(4)) for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize(("temperature", "n"), [(1.0, 1), (0.5, 2), (1 / 3, 3), (0.333, 3), (0.25, 4)])
def test_inverse_temperature(temperature, n):
    assert inverse_temperature(temperature) == n


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.7, 1.5, math.nan, math.inf])
def test_other_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be"):
        inverse_temperature(temperature)


def test_too_small_a_pool_is_refused():
    with pytest.raises(ValueError, match="at least 3 draws, got 2"):
        sample_from_pool(torch.zeros(2, 1, 4, dtype=torch.long), 1 / 3)
