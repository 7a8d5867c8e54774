"""Temperature sampling from draws alone (paper section 5; derivations in docs/temperature.md).

The target distribution at temperature T is P(x)^(1/T), normalized, over chunks x; all we have is a way to
sample from P. Shapes: N draws, R rows (contexts that are sampled independently), K tokens of a chunk,
A rows that are still undecided, D rows that are done.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from calm.core.coincidence import find_accepted, sibuya_lifetimes
from calm.core.pool import Pool, TokenReader
from calm.core.random import Randomness, select_rows, uniform

DrawRows = Callable[[int, Tensor], Tensor]
"""draw(num_draws, rows_R): independent draws for those rows at temperature 1: token ids (N, R, K), or
states (N, R, X) for a `TokenReader`."""

_ROUNDING = 1e-3  # Relative; 1/T this close to an integer is taken for it.
_SMALLEST_TEMPERATURE = 1e-300
_GREEDY_BELOW = 1e-6
_MAX_DRAWS_NAMED = 10**6  # Error messages suggest more draws only up to this; nobody would make more.
_FIRST_BLOCK = 16
_FIRST_BLOCK_WITH_READER = 4  # If tokens are expensive to decode, so are unneeded draws.
_GROWTH = 3  # Few long blocks: with few rows, the overhead of a block is that of dozens of draws.


class ChunkSample(NamedTuple):
    """One chunk for every row, and the draws it took.

    Args:
        chunks_RK: Token ids.
        num_draws_R: Draws that were made.
        num_needed_R: Draws that the decision used; fewer than `num_draws_R` if the last block of draws
            was longer than necessary.
        fell_back_R: Whether exact sampling ran out of its budget and the pool rule decided.
        agreement_R: Share of the draws that equal the chosen chunk.
    """

    chunks_RK: Tensor
    num_draws_R: Tensor
    num_needed_R: Tensor
    fell_back_R: Tensor
    agreement_R: Tensor


def decodes_greedily(temperature: float) -> bool:
    """Whether a token-level model decodes greedily: the temperature is too low to divide logits by."""
    return temperature < _GREEDY_BELOW


def inverse_temperature(temperature: float) -> float:
    """The exponent 1/T: infinite at 0, and an integer if T is a rounded reciprocal such as 0.333.

    Raises:
        ValueError: If T lies outside [0, 1], or is so small that 1/T overflows.
    """
    if not 0 <= temperature <= 1:
        raise ValueError(f"temperature must lie between 0 and 1, got {temperature}.")
    if temperature == 0:
        return math.inf
    if temperature < _SMALLEST_TEMPERATURE:  # 1/T would overflow.
        raise ValueError(
            f"a temperature above 0 must be at least {_SMALLEST_TEMPERATURE:g}, got {temperature:g}."
        )
    order = 1 / temperature
    return float(round(order)) if abs(temperature * round(order) - 1) <= _ROUNDING else order


def sample_from_pool(
    pool_NRK: Tensor,
    temperature: float,
    randomness: Randomness = None,
    *,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> ChunkSample:
    """Choose one chunk from each row's pool; its distribution converges to P^(1/T) as the pool grows.

    A chunk that occurs c times has weight C(c, s) = Γ(c+1) / (Γ(s+1) Γ(c-s+1)), where s is 1/T, or
    the largest count of the row if that is smaller. For T = 1/n this is the paper's rule: n-fold
    coincidences, or the largest ones if there are none. At T = 0 the most frequent chunk wins.

    Args:
        pool_NRK: Token ids of N independent draws for each row.
        temperature: T in [0, 1].
        randomness: Source of one uniform number per row.
        top_p: Keep the smallest set of most frequent chunks whose shares of the pool sum to at least this;
            chunks tied with the last one kept stay too.
        min_p: Drop chunks whose frequency is below this fraction of the most frequent one's.

    Raises:
        ValueError: If the temperature is out of range or the pool smaller than 1/T.
    """
    pool = Pool(pool_NRK)
    return choose_from_pool(pool, pool.number(), temperature, randomness, top_p, min_p)


def distribution_of_pool(
    count_C: Tensor, temperature: float, *, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Probability that `sample_from_pool` chooses each distinct chunk of a pool, (C,).

    Args:
        count_C: How often each chunk occurs, at least once.
        temperature: T in [0, 1].
        top_p: See `sample_from_pool`.
        min_p: See `sample_from_pool`.

    Raises:
        ValueError: If the temperature is out of range or the pool smaller than 1/T.
    """
    chunk_N = torch.arange(len(count_C), device=count_C.device).repeat_interleave(count_C)
    count_1N = count_C[chunk_N].unsqueeze(0)
    log_weight_1N = _log_weights(count_1N, order_for(temperature, len(chunk_N)))
    log_weight_1N = log_weight_1N.masked_fill(_is_cut(count_1N, top_p, min_p), -math.inf)
    p_N = (log_weight_1N - count_1N.double().log())[0].softmax(0)
    return p_N.new_zeros(len(count_C)).index_add_(0, chunk_N, p_N)


def sample_exact(
    draw: DrawRows,
    num_rows: int,
    temperature: float,
    *,
    max_draws: int = 200,
    first_block: int | None = None,
    randomness: Randomness = None,
    reader: TokenReader | None = None,
) -> ChunkSample:
    """Sample one chunk for each row from P^(1/T), for any T in (0, 1].

    Two stages, see `calm.core.coincidence`: as many equal draws as the integer part of 1/T, then a
    Bernoulli factory for the fractional part. With S(q) the sum of P(x)^q over all x and 1/T = n + a, the
    expected number of draws is (1 + S(1) + ... + S(n-1) + [a > 0] S(n+a-1)) / S(n+a).

    Draws are made in blocks: the first has `first_block` draws (by default 16, or 4 with a reader), and each
    further one is three times as long as all before it together; decided rows draw no more. The
    distribution does not depend on the blocks. Rows that are undecided after `max_draws` use the pool rule
    on all their draws.

    Args:
        draw: Makes draws for some rows.
        num_rows: Number of rows R.
        temperature: T in (0, 1].
        max_draws: Draw budget per row, at least 1/T.
        first_block: Draws in the first block.
        randomness: Randomness of the lifetimes and of the pool rule's choices.
        reader: Decodes draws that are not token ids; it affects the cost, not the result.

    Raises:
        ValueError: If the temperature is out of range or the budget smaller than 1/T.
    """
    order = order_for(temperature, max_draws, "max_draws=")
    if math.isinf(order):
        raise ValueError("exact sampling needs a temperature above 0; the pool rule also supports 0.")
    if first_block is None:
        first_block = _FIRST_BLOCK if reader is None else _FIRST_BLOCK_WITH_READER
    n, a = math.floor(order), order - math.floor(order)
    parts: list[tuple[Tensor, ChunkSample]] = []
    rows_A = torch.arange(num_rows)
    pool: Pool | None = None
    lifetime_AN = None
    while len(rows_A):
        num_drawn = 0 if pool is None else len(pool)
        block_size = min(max_draws - num_drawn, max(first_block, _GROWTH * num_drawn))
        block_NAX = draw(block_size, rows_A)
        if pool is None:
            pool = Pool(block_NAX, reader)
        else:
            pool.extend(block_NAX)
        if a > 0:
            uniform_NA = uniform(
                block_size, len(rows_A), 1, select_rows(randomness, rows_A), pool.device, torch.float64
            ).squeeze(-1)
            block_AN = sibuya_lifetimes(uniform_NA.T.contiguous(), a, max_draws)
            lifetime_AN = block_AN if lifetime_AN is None else torch.cat([lifetime_AN, block_AN], dim=1)
        number_AN = pool.number()
        winner_A, needed_A = find_accepted(number_AN, n, lifetime_AN)
        is_undecided_A = winner_A < 0
        parts.append((rows_A[~is_undecided_A.cpu()], _accepted(pool, number_AN, winner_A, needed_A)))
        rows_A = rows_A[is_undecided_A.cpu()]
        pool.keep(is_undecided_A)
        lifetime_AN = None if lifetime_AN is None else lifetime_AN[is_undecided_A]
        if len(rows_A) and len(pool) >= max_draws:
            choice = choose_from_pool(
                pool, number_AN[is_undecided_A], temperature, select_rows(randomness, rows_A)
            )
            parts.append((rows_A, choice._replace(fell_back_R=torch.ones_like(choice.fell_back_R))))
            break
    order_R = torch.cat([rows for rows, _ in parts]).argsort()
    fields = zip(*(sample for _, sample in parts), strict=True)
    return ChunkSample(*(torch.cat(field)[order_R.to(field[0].device)] for field in fields))


def order_for(temperature: float, num_draws: int | None = None, name: str = "") -> float:
    """The exponent 1/T, after checking that `num_draws` suffice; `name` is their setting in errors."""
    order = inverse_temperature(temperature)
    if num_draws is None:
        return order
    needed = 1 if math.isinf(order) else math.ceil(order)
    if num_draws < needed and needed > _MAX_DRAWS_NAMED and num_draws > 0:
        raise ValueError(
            f"a temperature of {temperature:g} needs {order:.3g} draws, got {name}{num_draws}; the "
            f"lowest temperature above 0 with that many is {1 / num_draws:g}."
        )
    if num_draws < needed:
        raise ValueError(
            f"a temperature of {temperature:g} needs at least {needed} draws, got {name}{num_draws}."
        )
    return order


def check_cuts(top_p: float, min_p: float) -> None:
    """Raise ValueError if top_p or min_p is out of range."""
    if not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(
            f"top_p must lie in (0, 1] and min_p in [0, 1]; got top_p={top_p:g} and min_p={min_p:g}."
        )


def _accepted(pool: Pool, number_AN: Tensor, winner_A: Tensor, needed_A: Tensor) -> ChunkSample:
    """The sample for the rows that have a winner."""
    done_D = (winner_A >= 0).nonzero().squeeze(1)
    winner_D = winner_A[done_D]
    number_DN = number_AN[done_D]
    is_equal_DN = number_DN == number_DN.gather(1, winner_D.unsqueeze(1))
    return ChunkSample(
        pool.chunks(winner_D, done_D),
        torch.full_like(done_D, len(pool)),
        needed_A[done_D],
        torch.zeros_like(done_D, dtype=torch.bool),
        is_equal_DN.double().mean(1),
    )


def choose_from_pool(
    pool: Pool,
    number_RN: Tensor,
    temperature: float,
    randomness: Randomness,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> ChunkSample:
    """The pool rule; see `sample_from_pool`."""
    num_draws, num_rows, device = len(pool), pool.num_rows, pool.device
    order = order_for(temperature, num_draws)
    count_RN = torch.bincount(number_RN.flatten())[number_RN]
    log_weight_RN = _log_weights(count_RN, order)
    log_weight_RN = log_weight_RN.masked_fill(_is_cut(count_RN, top_p, min_p), -math.inf)
    # Each of c equal draws carries 1/c of its chunk's weight.
    log_weight_RN = log_weight_RN - count_RN.double().log()
    cumulative_RN = (log_weight_RN - log_weight_RN.amax(-1, keepdim=True)).exp().cumsum(-1)
    uniform_R1 = uniform(1, num_rows, 1, randomness, device, torch.float64)[0]
    threshold_R1 = uniform_R1 * cumulative_RN[:, -1:]
    chosen_R1 = torch.searchsorted(cumulative_RN, threshold_R1, right=True).clamp_max(num_draws - 1)
    num_draws_R = torch.full((num_rows,), num_draws, device=device)
    return ChunkSample(
        pool.chunks(chosen_R1.squeeze(-1), torch.arange(num_rows, device=device)),
        num_draws_R,
        num_draws_R,
        torch.zeros_like(num_draws_R, dtype=torch.bool),
        count_RN.gather(1, chosen_R1).squeeze(1).double() / num_draws,
    )


def _log_weights(count_RN: Tensor, order: float) -> Tensor:
    """log C(count, s) with s = min(order, largest count of the row), in float64."""
    count = count_RN.double()
    size_R1 = count.amax(-1, keepdim=True).clamp_max(order)
    log_weight = torch.lgamma(count + 1) - torch.lgamma(size_R1 + 1) - torch.lgamma(count - size_R1 + 1)
    # A chunk that occurs fewer than floor(s) times is no candidate.
    return torch.where(count >= size_R1.floor(), log_weight, -math.inf)


def _is_cut(count_RN: Tensor, top_p: float, min_p: float) -> Tensor:
    """Which draws top_p or min_p removes."""
    # Each share is a single division in float64, so that a share equal to its limit compares as equal.
    is_rare_RN = count_RN.double() / count_RN.amax(-1, keepdim=True) < min_p
    sorted_RN = count_RN.sort(dim=-1).values
    num_at_most_RN = torch.searchsorted(sorted_RN, count_RN.contiguous(), right=True)
    num_draws = count_RN.shape[-1]
    share_of_commoner_RN = (num_draws - num_at_most_RN).double() / num_draws
    return is_rare_RN | (share_of_commoner_RN >= top_p)
