"""Distributions of the temperature samplers, and what they cost, against enumeration of known distributions.

Every check is also pointed at samplers with a planted fault, which it must reject.
"""

import math

import pytest
import torch
from scipy import stats

import calm.core.temperature as temperature_module
from calm.core.temperature import sample_exact, sample_from_pool

NUM_SAMPLES = 100_000
DISTRIBUTIONS = {
    "flat": torch.full((4,), 0.25, dtype=torch.float64),
    "peaked": torch.tensor([0.7, 0.1, 0.1, 0.05, 0.03, 0.02], dtype=torch.float64),
    "zipf": torch.arange(1, 51, dtype=torch.float64) ** -1.5,
}
DISTRIBUTIONS["zipf"] /= DISTRIBUTIONS["zipf"].sum()
TEMPERATURES = (0.9, 0.7, 0.5, 0.37, 1 / 3, 0.25)


def draws_of(p_V, seed):
    """Chunks of two ids that stand for outcomes of the distribution: (v // 7, v % 7)."""
    generator = torch.Generator().manual_seed(seed)
    cumulative_V = p_V.cumsum(0)

    def draw(num_draws, rows):
        uniform = torch.rand((num_draws, len(rows)), generator=generator, dtype=torch.float64)
        outcome = torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True)
        return torch.stack([outcome // 7, outcome % 7], dim=-1)

    return draw


def run_exact(p_V, temperature, first_block=16, num_samples=NUM_SAMPLES, seed=0):
    """Outcomes and draws needed, in batches that bound the memory."""
    draw, randomness = draws_of(p_V, seed), torch.Generator().manual_seed(seed + 1)
    outcomes, needed = [], []
    for _ in range(10):
        result = sample_exact(
            draw,
            num_samples // 10,
            temperature,
            max_draws=200_000,
            first_block=first_block,
            randomness=randomness,
        )
        assert not result.fell_back_R.any()
        outcomes.append(result.chunks_RK[:, 0] * 7 + result.chunks_RK[:, 1])
        needed.append(result.num_needed_R)
    return torch.cat(outcomes), torch.cat(needed)


def tempered(p_V, temperature):
    powers = p_V ** (1 / temperature)
    return powers / powers.sum()


def p_value(outcomes, p_V, temperature):
    """Of a chi-square test in which outcomes expected fewer than 5 times are merged."""
    expected = tempered(p_V, temperature) * len(outcomes)
    observed = torch.bincount(outcomes, minlength=len(p_V)).double()
    common = expected >= 5
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    is_possible = expected > 0
    return stats.chisquare(observed[is_possible].numpy(), expected[is_possible].numpy()).pvalue


def expected_draws(p_V, temperature):
    order = 1 / temperature
    n = math.floor(order + 1e-9)
    a = order - n if order - n > 1e-9 else 0.0
    power_sum = {q: float((p_V**q).sum()) for q in [*range(1, n + 1), order, n + a - 1]}
    return (1 + sum(power_sum[q] for q in range(1, n)) + (power_sum[n + a - 1] if a else 0)) / power_sum[
        order
    ]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_exact_sampling_has_the_right_distribution_and_expected_cost(name, temperature):
    p_V = DISTRIBUTIONS[name]
    outcomes, needed = run_exact(p_V, temperature)
    assert p_value(outcomes, p_V, temperature) > 1e-3
    error = needed.double().std().item() / math.sqrt(len(needed))
    assert needed.double().mean().item() == pytest.approx(expected_draws(p_V, temperature), abs=4 * error)


@pytest.mark.parametrize("first_block", [1, 3, 64])
@pytest.mark.parametrize("temperature", [0.7, 0.37, 1 / 3])
def test_exact_sampling_does_not_depend_on_the_block_size(first_block, temperature):
    outcomes, needed = run_exact(DISTRIBUTIONS["peaked"], temperature, first_block, seed=first_block)
    assert p_value(outcomes, DISTRIBUTIONS["peaked"], temperature) > 1e-3
    error = needed.double().std().item() / math.sqrt(len(needed))
    assert needed.double().mean().item() == pytest.approx(
        expected_draws(DISTRIBUTIONS["peaked"], temperature), abs=4 * error
    )


def test_effect_of_a_small_budget_does_not_depend_on_the_block_size():
    """What it decides depends on the draws, not on how they are grouped."""
    p_V = DISTRIBUTIONS["zipf"]
    tables = []
    for first_block in (1, 5, 12):
        randomness = torch.Generator().manual_seed(first_block)
        result = sample_exact(
            draws_of(p_V, first_block),
            50_000,
            0.4,
            max_draws=12,
            first_block=first_block,
            randomness=randomness,
        )
        outcomes = result.chunks_RK[:, 0] * 7 + result.chunks_RK[:, 1]
        table = torch.bincount(outcomes.clamp_max(20) * 2 + result.fell_back_R, minlength=42)
        tables.append(table)
    counts = torch.stack(tables)
    assert stats.chi2_contingency(counts[:, counts.sum(0) > 0].numpy()).pvalue > 1e-3
    assert 0.1 < counts[:, 1::2].sum() / counts.sum() < 0.9


def test_pool_sampling_converges_to_the_tempered_distribution():
    distances = {}
    for temperature in (0.7, 0.5, 0.37):
        for size in (5, 20, 100, 400):
            p_V, counts = DISTRIBUTIONS["zipf"], 0
            draw, randomness = draws_of(p_V, size), torch.Generator().manual_seed(0)
            for _ in range(10):
                chosen = sample_from_pool(draw(size, torch.arange(2_000)), temperature, randomness).chunks_RK
                counts = counts + torch.bincount(chosen[:, 0] * 7 + chosen[:, 1], minlength=50)
            distance = 0.5 * (counts / counts.sum() - tempered(p_V, temperature)).abs().sum()
            distances[temperature, size] = distance.item()
        falling = [distances[temperature, size] for size in (5, 20, 100, 400)]
        assert falling == sorted(falling, reverse=True) and falling[-1] < 0.06, falling


def one_more(number_RN, n, lifetime_RN=None, find=temperature_module.find_accepted):
    return find(number_RN, n + 1, lifetime_RN)


def no_second_stage(number_RN, n, lifetime_RN=None, find=temperature_module.find_accepted):
    return find(number_RN, n, None)


def first_row_for_all(number_RN, n, lifetime_RN=None, find=temperature_module.find_accepted):
    """The winner of the first decided row is used for all decided rows."""
    winner_R, needed_R = find(number_RN, n, lifetime_RN)
    decided = winner_R[winner_R >= 0]
    return torch.where(winner_R >= 0, decided[0] if len(decided) else -1, winner_R), needed_R


def no_restart(number_RN, n, lifetime_RN=None, find=None):
    """The first two equal neighbors win, wherever the attempts begin."""
    equal_RN = number_RN[:, :-1] == number_RN[:, 1:]
    first_R = torch.where(equal_RN.any(1), equal_RN.int().argmax(1), -1)
    return first_R, first_R + 2


@pytest.mark.parametrize(
    ("fault", "temperature"),
    [(one_more, 0.5), (no_second_stage, 0.37), (first_row_for_all, 0.5), (no_restart, 0.5)],
)
def test_planted_fault_is_detected(monkeypatch, fault, temperature):
    monkeypatch.setattr(temperature_module, "find_accepted", fault)
    outcomes, _ = run_exact(DISTRIBUTIONS["peaked"], temperature, num_samples=20_000)
    assert p_value(outcomes, DISTRIBUTIONS["peaked"], temperature) < 1e-6
