"""Brier scores from draws: literal values, unbiasedness by enumeration, and BrierLM's edges."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from calm.core.brier import brier_lm, brier_scores, matching_prefixes


def test_literal_values():
    target = torch.tensor([[1, 2, 3, 4]])
    right, half, wrong = target, torch.tensor([[1, 2, 9, 4]]), torch.tensor([[7, 7, 7, 7]])
    assert_close(brier_scores(right, right, target), torch.tensor([[1.0, 1, 1, 1]]))
    assert_close(brier_scores(right, half, target), torch.tensor([[1.0, 1, 1, 1]]))
    assert_close(brier_scores(half, half, target), torch.tensor([[1.0, 1, -1, -1]]))
    assert_close(brier_scores(wrong, right, target), torch.tensor([[1.0, 1, 1, 1]]))
    assert_close(brier_scores(wrong, wrong, target), torch.tensor([[-1.0, -1, -1, -1]]))
    assert_close(brier_scores(wrong, half, target), torch.tensor([[1.0, 1, 0, 0]]))


def test_prefix_matches_only_if_all_its_tokens_do():
    assert matching_prefixes(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 9, 3]])).tolist() == [
        [True, False, False]
    ]


def test_expectation_is_the_brier_score():
    """Exact expectation over all pairs of draws equals 2 P(y) - sum P^2 for every outcome."""
    distribution = {(0, 0): 0.5, (0, 1): 0.2, (1, 0): 0.3}
    for target in distribution:
        expected = torch.zeros(2)
        for (a, p), (b, q) in itertools.product(distribution.items(), distribution.items()):
            expected += p * q * brier_scores(*(torch.tensor([x]) for x in (a, b, target)))[0]
        first = {0: 0.7, 1: 0.3}
        order_1 = 2 * first[target[0]] - sum(p**2 for p in first.values())
        order_2 = 2 * distribution[target] - sum(p**2 for p in distribution.values())
        assert_close(expected, torch.tensor([order_1, order_2]))


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="the same shape"):
        brier_scores(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 3))


def test_brier_lm_is_the_geometric_mean():
    assert brier_lm([1.0, 1.0, 1.0, 1.0]) == pytest.approx(100.0)
    assert brier_lm([0.16, 0.01, 0.04, 0.0625]) == pytest.approx(100 * (0.16 * 0.01 * 0.04 * 0.0625) ** 0.25)


def test_brier_lm_is_zero_if_a_factor_is_not_positive():
    assert brier_lm([-0.5, -0.5, 0.5, 0.5]) == 0.0
    assert brier_lm([0.5, 0.5, 0.0, 0.5]) == 0.0
    assert brier_lm([-0.1, -0.1, -0.1, -0.1]) == 0.0


def test_brier_lm_of_nan_is_nan_and_of_three_orders_an_error():
    assert math.isnan(brier_lm([0.1, math.nan, 0.1, 0.1]))
    with pytest.raises(ValueError, match="4 orders"):
        brier_lm([0.1, 0.1, 0.1])
