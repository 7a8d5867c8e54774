"""The coincidence test of the exact sampler, on numbered outcomes: which draw is accepted first?

Shapes: N draws in the order they were made, R rows.

With 1/T = n + a, n an integer and 0 <= a < 1, an attempt reads draws until one differs from the first.
If the first n are equal, their outcome x is the candidate, which happens with probability P(x)^n.
A candidate is then accepted with probability P(x)^a: it gets a lifetime L and must be drawn
again within L draws. L has the Sibuya distribution P(L > k) = (1 - a)(1 - a/2)...(1 - a/k), whose
generating function is E[z^L] = 1 - (1 - z)^a; with z = 1 - P(x), the probability of not being drawn in
time is 1 - P(x)^a. (This is the Bernoulli factory that gives up after the i-th miss with
probability a/i, with all its coins flipped in advance.) A failed attempt discards all its draws.
"""

import torch
from torch import Tensor


def sibuya_lifetimes(uniform: Tensor, a: float, longest: int) -> Tensor:
    """Sibuya-distributed lifetimes from uniform numbers, clipped at `longest` + 1."""
    trials = torch.arange(1, longest + 1, dtype=torch.float64, device=uniform.device)
    survival = torch.cumprod(1 - a / trials, dim=0)
    return 1 + torch.searchsorted(-survival, -uniform.double())


def find_accepted(number_RN: Tensor, n: int, lifetime_RN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the test from the first draw and find the accepted one.

    Args:
        number_RN: Outcome of each draw, as numbered by `calm.core.pool.Pool.number`.
        n: Number of draws that must be equal, the integer part of 1/T.
        lifetime_RN: Lifetime of a candidate whose attempt starts at that draw; None if
            1/T is an integer and candidates win at once.

    Returns:
        Index of a draw with the winning outcome, and the number of draws read to decide, both (R,);
        both are -1 where the draws run out before there is a winner.
    """
    num_rows, num_draws = number_RN.shape
    index_N = torch.arange(num_draws, device=number_RN.device)
    last_RN = _end_of_run(number_RN)
    is_candidate_RN = last_RN - index_N + 1 >= n
    group_end_RN = (index_N + n - 1).clamp_max(num_draws - 1).expand(num_rows, -1)
    if lifetime_RN is None:
        wins_RN, decided_RN = is_candidate_RN, group_end_RN + 1
        restart_RN = last_RN + 2  # An attempt reads one draw beyond the run.
    else:
        repeat_RN = _next_equal(number_RN).gather(1, group_end_RN)
        deadline_RN = group_end_RN + lifetime_RN
        wins_RN = is_candidate_RN & (repeat_RN <= deadline_RN) & (repeat_RN < num_draws)
        decided_RN = repeat_RN + 1
        restart_RN = torch.where(is_candidate_RN, deadline_RN, last_RN + 1) + 1
    # Attempts form a chain: each draw points to where the next attempt would start. Winners and the
    # end of the draws point to themselves; pointer doubling follows all chains to their ends at once.
    restart_RN = torch.where(wins_RN, index_N, restart_RN.clamp_max(num_draws))
    chain = torch.cat([restart_RN, torch.full_like(restart_RN[:, :1], num_draws)], dim=1)
    for _ in range(num_draws.bit_length()):
        chain = chain.gather(1, chain)
    end_R = chain[:, 0]
    has_winner_R = end_R < num_draws
    decided_R = decided_RN.gather(1, end_R.clamp_max(num_draws - 1).unsqueeze(1)).squeeze(1)
    return torch.where(has_winner_R, end_R, -1), torch.where(has_winner_R, decided_R, -1)


def _end_of_run(number_RN: Tensor) -> Tensor:
    """Index of the last draw in the run of consecutive equal draws that each draw belongs to."""
    num_draws = number_RN.shape[1]
    index_N = torch.arange(num_draws, device=number_RN.device)
    is_end_RN = torch.ones_like(number_RN, dtype=torch.bool)
    is_end_RN[:, :-1] = number_RN[:, :-1] != number_RN[:, 1:]
    end_RN = torch.where(is_end_RN, index_N, num_draws)
    return end_RN.flip(1).cummin(1).values.flip(1)


def _next_equal(number_RN: Tensor) -> Tensor:
    """Index of the next draw with the same outcome; N if there is none."""
    num_draws = number_RN.shape[1]
    sorted_RN, order_RN = number_RN.sort(dim=1, stable=True)
    next_RN = torch.full_like(order_RN, num_draws)
    is_same_RN = sorted_RN[:, :-1] == sorted_RN[:, 1:]
    next_RN[:, :-1] = torch.where(is_same_RN, order_RN[:, 1:], num_draws)
    return torch.empty_like(order_RN).scatter_(1, order_RN, next_RN)
