"""The samplers against enumeration and hand-computed weights; distributions are in tests/statistical."""

import itertools
import math

import pytest
import torch
from scipy import special, stats

from calm.core.temperature import (
    inverse_temperature,
    sample_exact,
    sample_from_pool,
)
from calm.models.generation.sampler_registry import sampler_from


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pool_of(counts, chunk_size=3):
    """A pool of one row that has counts[i] copies of the chunk (i, i, ..., i)."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ids[:, None, None].expand(-1, 1, chunk_size)


def frequencies(counts, temperature, repeats=40_000, **cuts):
    pool_NRK = pool_of(counts).expand(-1, repeats, -1)
    chosen = sample_from_pool(pool_NRK, temperature, seeded(), **cuts).chunks_RK
    return torch.bincount(chosen[:, 0], minlength=len(counts))


def assert_weights(observed, weights):
    expected = torch.as_tensor(weights, dtype=torch.float64) / sum(weights)
    assert (observed[expected == 0] == 0).all()
    is_possible = expected > 0
    if is_possible.sum() == 1:
        return
    expected_counts = (expected[is_possible] * observed.sum()).numpy()
    assert stats.chisquare(observed[is_possible].numpy(), expected_counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("counts", "temperature", "weights"),
    [
        ([3, 2], 1 / 2, [3, 1]),  # C(3,2) and C(2,2): the example of the paper.
        ([4, 3, 1], 1 / 3, [4, 1, 0]),
        ([1, 1, 1], 1 / 2, [1, 1, 1]),  # No pair: the rule falls back to m = 1.
        ([2, 2, 1, 1], 1 / 4, [1, 1, 0, 0]),  # No four, no three: m = 2.
        ([5, 3], 1.0, [5, 3]),
        ([5, 3, 5], 0.0, [1, 0, 1]),  # The mode; ties are drawn.
        # C(c, 3/2) of 4, 2 and 1 in units of 1/Γ(5/2): 24/Γ(7/2), 2/Γ(3/2), 1/Γ(1/2).
        ([4, 2, 1], 2 / 3, [24 / (15 / 8), 2 / (1 / 2), 1]),
        ([2, 2, 1], 1 / 2.5, [1, 1, 0]),  # n = 2: a single draw is no candidate.
    ],
)
def test_weights_of_the_pool_rule(counts, temperature, weights):
    assert_weights(frequencies(counts, temperature), weights)


@pytest.mark.parametrize("order", [1.25, 1.5, 2.3, 3.9])
def test_pool_weights_match_the_exact_sampler_at_fractional_orders(order):
    """Enumerate all orders of a pool, and run one attempt of the exact sampler on each.

    A candidate whose lifetime exceeds the pool is accepted. Accepted chunks have the pool rule's weights.
    """
    counts = [4, 2, 1] if order < 3 else [4, 3]
    n, a = math.floor(order), order - math.floor(order)
    draws = [i for i, count in enumerate(counts) for _ in range(count)]
    accepted = [0.0] * len(counts)
    for stream in itertools.permutations(draws):
        if len(set(stream[:n])) > 1:
            continue
        remaining = stream[n:]
        misses = remaining.index(stream[0]) if stream[0] in remaining else len(remaining)
        accepted[stream[0]] += math.prod(1 - a / i for i in range(1, misses + 1))
    weights = special.binom(counts, order) * (torch.tensor(counts) >= n).numpy()
    assert torch.tensor(accepted) / sum(accepted) == pytest.approx(weights / weights.sum(), rel=1e-6)
    assert_weights(frequencies(counts, 1 / order), weights.tolist())


def test_pool_rule_is_continuous_at_integer_orders():
    for order in (2, 3):
        for near in (order - 2e-3, order + 2e-3):
            exact, close = frequencies([5, 4, 2, 1], 1 / order), frequencies([5, 4, 2, 1], 1 / near)
            assert (exact - close).abs().max() < 500


@pytest.mark.parametrize(
    ("cuts", "weights"),
    [
        ({"min_p": 0.5}, [6, 3, 3, 0]),
        ({"min_p": 0.6}, [6, 0, 0, 0]),
        ({"top_p": 0.4}, [6, 0, 0, 0]),
        ({"top_p": 0.5}, [6, 3, 3, 0]),  # 6/13 is less than half, and the two threes are tied.
        ({"top_p": 1.0}, [6, 3, 3, 1]),
    ],
)
def test_truncation_keeps_the_most_frequent(cuts, weights):
    assert_weights(frequencies([6, 3, 3, 1], 1.0, **cuts), weights)


@pytest.mark.parametrize("first", range(1, 30))
def test_share_equal_to_a_limit_is_within_it(first):
    """However shares are rounded: one chunk with share top_p is enough, and one at min_p is kept."""
    others = 30 - first
    assert (frequencies([first, *[1] * others], 1.0, 40, top_p=first / 30)[1:] > 0).any() == (first == 1)
    if first % 10 == 0:
        assert (frequencies([first, first // 10], 1.0, 400, min_p=0.1) > 0).all()


def test_chunks_are_compared_by_all_ids():
    # All first tokens are the same, so only the last two draws are equal.
    pool = torch.tensor([[5, 1], [5, 2], [5, 3], [5, 3]]).unsqueeze(1)
    chosen = sample_from_pool(pool.expand(-1, 500, -1), 0.5, seeded()).chunks_RK
    assert (chosen == torch.tensor([5, 3])).all()


def test_rows_do_not_mix():
    pool = torch.arange(6)[None, :, None].expand(10, -1, 4)
    assert (sample_from_pool(pool, 0.5, seeded()).chunks_RK[:, 0] == torch.arange(6)).all()


def test_agreement_is_the_share_of_equal_draws():
    assert sample_from_pool(pool_of([7, 1]), 0.0, seeded()).agreement_R.item() == 7 / 8


def draw_from(distribution_RV, generator):
    """Draws from a distribution of each row."""

    def draw(num_draws, rows):
        draws_RN = torch.multinomial(distribution_RV[rows], num_draws, replacement=True, generator=generator)
        return draws_RN.T.unsqueeze(-1)

    return draw


def test_decided_rows_draw_no_more():
    distribution = torch.tensor([[1.0, 0.0]] * 3 + [[0.5, 0.5]] * 2)
    requests = []

    def draw(num_draws, rows):
        requests.append((num_draws, rows.tolist()))
        return draw_from(distribution, generator)(num_draws, rows)

    generator = seeded(3)
    result = sample_exact(draw, 5, 0.25, first_block=4, max_draws=1000, randomness=generator)
    assert requests[0] == (4, [0, 1, 2, 3, 4])
    assert all(set(rows) <= {3, 4} for _, rows in requests[1:]) and len(requests) > 1
    assert result.num_draws_R[:3].tolist() == [4, 4, 4] and (result.chunks_RK[:3] == 0).all()
    assert (result.num_draws_R >= result.num_needed_R).all()


def test_exhausted_budget_falls_back_to_the_pool_rule():
    """No two draws are ever equal, so nothing is accepted, and the pool rule may choose any draw."""
    counter = itertools.count()

    def draw(num_draws, rows):
        return torch.tensor([[[next(counter)] for _ in rows] for _ in range(num_draws)])

    result = sample_exact(draw, 3, 0.5, max_draws=21, first_block=4, randomness=seeded())
    assert result.fell_back_R.all() and (result.num_draws_R == 21).all()
    assert next(counter) == 63
    assert len(set(result.chunks_RK.flatten().tolist())) == 3


def test_rows_that_fell_back_keep_their_order():
    distribution = torch.tensor([[0.1] * 10, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1.0], [0.1] * 10])
    result = sample_exact(draw_from(distribution, seeded(1)), 3, 0.125, max_draws=16, randomness=seeded())
    assert result.fell_back_R.tolist() == [True, False, True]
    assert result.chunks_RK[1, 0] == 9


@pytest.mark.parametrize("sampler", ["exact", "pool"])
def test_one_draw_at_temperature_one(sampler):
    settings = sampler_from(temperature=1.0, sampler=sampler)
    result = settings.sample(draw_from(torch.eye(3), seeded()), 3)
    assert result.chunks_RK.flatten().tolist() == [0, 1, 2]
    assert result.num_draws_R.tolist() == [1, 1, 1]


@pytest.mark.parametrize("sampler", ["exact", "pool"])
def test_temperature_zero_gives_the_mode_of_the_pool(sampler):
    distribution = torch.tensor([[0.2, 0.5, 0.3]]).expand(50, -1)
    settings = sampler_from(temperature=0, sampler=sampler, num_draws=400)
    result = settings.sample(draw_from(distribution, seeded()), 50, seeded(1))
    assert (result.chunks_RK == 1).all() and (result.num_draws_R == 400).all()


@pytest.mark.parametrize("settings", [{}, {"sampler": "pool"}, {"sampler": "pool", "top_p": 0.9}])
@pytest.mark.parametrize("temperature", [0.0, 0.37, 0.5, 1.0])
def test_same_seed_same_choice(settings, temperature):
    distribution = torch.rand(20, 6, generator=seeded())
    sampler = sampler_from(temperature=temperature, **settings)
    first, second = (
        sampler.sample(draw_from(distribution, seeded(4)), 20, seeded(5)).chunks_RK for _ in range(2)
    )
    assert (first == second).all()


@pytest.mark.parametrize(
    ("temperature", "order"),
    [(1.0, 1), (0.5, 2), (1 / 3, 3), (0.333, 3), (0.25, 4), (0.4, 2.5), (0, math.inf)],
)
def test_inverse_temperature(temperature, order):
    assert inverse_temperature(temperature) == order


@pytest.mark.parametrize("temperature", [-1.0, 1.5, math.nan, math.inf])
def test_temperatures_out_of_range_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must lie between 0 and 1"):
        sampler_from(temperature=temperature)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "beam"}, "sampler must be one of exact, pool, head; got 'beam'"),
        ({"temperature": 0.3, "max_draws": 3}, "at least 4 draws, got max_draws=3"),
        ({"temperature": 0.3, "sampler": "pool", "num_draws": 3}, "at least 4 draws, got num_draws=3"),
        ({"temperature": 0, "num_draws": 0}, "num_draws must be at least 1, got 0"),
        ({"sampler": "pool", "top_p": 0.0}, "top_p must lie in"),
        ({"sampler": "pool", "min_p": 1.5}, "min_p in"),
        ({"temperature": 0.5, "top_p": 0.9}, "use them with sampler='pool'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler_from(**settings)


def test_fewer_draws_than_the_temperature_needs_are_refused():
    with pytest.raises(ValueError, match="at least 3 draws, got 2"):
        sample_from_pool(torch.zeros(2, 1, 4, dtype=torch.long), 1 / 3)
    with pytest.raises(ValueError, match="at least 3 draws, got max_draws=2"):
        sample_exact(draw_from(torch.eye(1), None), 1, 1 / 3, max_draws=2)


@pytest.mark.parametrize("settings", [{"max_draws": 7}, {"sampler": "pool", "num_draws": 7}])
def test_tiny_temperature_is_refused_with_a_short_message(settings):
    [name] = settings.keys() - {"sampler"}
    message = (
        rf"^a temperature of 1e-300 needs 1e\+300 draws, got {name}=7; "
        r"the lowest temperature above 0 with that many is 0\.1"
    )
    with pytest.raises(ValueError, match=message) as raised:
        sampler_from(temperature=1e-300, **settings)
    assert len(str(raised.value)) < 120
    lowest = float(str(raised.value).rstrip(".").split()[-1])
    assert sampler_from(temperature=lowest, **settings).temperature == lowest


def test_exact_sampling_refuses_temperature_zero():
    with pytest.raises(ValueError, match="temperature above 0"):
        sample_exact(draw_from(torch.eye(1), None), 1, 0.0)


def test_empty_batch_is_refused():
    for name in ("exact", "pool", "head"):
        with pytest.raises(ValueError, match="the batch is empty"):
            sampler_from(sampler=name).sample(draw_from(torch.eye(1), None), 0)
