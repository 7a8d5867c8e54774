"""Brier scores from draws alone, and BrierLM (paper section 4).

Shapes: P positions, K tokens of a chunk (column n-1 belongs to order n).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NUM_ORDERS = 4  # BrierLM is made of Brier-1 to Brier-4.


def brier_scores(draw_1_PK: Tensor, draw_2_PK: Tensor, target_PK: Tensor) -> Tensor:
    """Unbiased estimates of Brier-1..Brier-K at every position, shape (P, K).

    Order n treats the next n tokens as one outcome y and estimates
    2 P(y) - sum_x P(x)^2 by 1{x1 = y} + 1{x2 = y} - 1{x1 = x2}, with x1, x2 the first n tokens of
    two independent draws.

    Args:
        draw_1_PK: Token ids of one draw of the model.
        draw_2_PK: Token ids of a second, independent draw.
        target_PK: Token ids of the text.

    Raises:
        ValueError: If the shapes differ.
    """
    if not draw_1_PK.shape == draw_2_PK.shape == target_PK.shape:
        raise ValueError(
            "draws and target must have one shape, got "
            f"{tuple(draw_1_PK.shape)}, {tuple(draw_2_PK.shape)} and {tuple(target_PK.shape)}."
        )
    hit_1 = matching_prefixes(draw_1_PK, target_PK)
    hit_2 = matching_prefixes(draw_2_PK, target_PK)
    collision = matching_prefixes(draw_1_PK, draw_2_PK)
    return hit_1.float() + hit_2.float() - collision.float()


def matching_prefixes(first_PK: Tensor, second_PK: Tensor) -> Tensor:
    """Whether the first n tokens agree, for n = 1..K: boolean, shape (P, K)."""
    return torch.eq(first_PK, second_PK).long().cumprod(-1).bool()


def brier_lm(means: Sequence[float] | Tensor) -> float:
    """BrierLM = 100 · (Brier-1 · Brier-2 · Brier-3 · Brier-4)^(1/4), from the mean of each order.

    A model without skill at some order (mean <= 0) scores 0: the product of two negative means
    would otherwise look like a good score.

    Args:
        means: Means of Brier-1 to Brier-4; further orders are ignored.

    Raises:
        ValueError: If fewer than four orders are given.
    """
    first = [float(mean) for mean in means[:NUM_ORDERS]]
    if len(first) < NUM_ORDERS:
        raise ValueError(f"BrierLM needs the means of {NUM_ORDERS} orders, got {len(first)}.")
    if any(math.isnan(mean) for mean in first):
        return math.nan
    if min(first) <= 0:
        return 0.0
    return 100 * math.exp(sum(map(math.log, first)) / NUM_ORDERS)
