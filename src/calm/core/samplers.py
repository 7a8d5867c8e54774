"""Samplers: how a chunk is chosen from draws. Each is a frozen dataclass with only the settings it needs.

To write your own, make a frozen dataclass with the members of `Sampler`. Shapes: R rows.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from calm.core.pool import Pool, TokenReader
from calm.core.random import Randomness
from calm.core.temperature import ChunkSample, check_cuts, choose_from_pool, order_for, sample_exact


class Draw(Protocol):
    """Makes independent draws for some rows."""

    def __call__(self, num_draws: int, rows_R: Tensor, temperature: float = 1.0, /) -> Tensor:
        """Token ids (N, R, K), or states (N, R, X) for a `TokenReader`.

        Args:
            num_draws: Number of draws N.
            rows_R: Indices of the rows.
            temperature: Below 1 only for heads that support it.
        """


@runtime_checkable
class Sampler(Protocol):
    """Chooses a chunk for every row.

    Rows with equal samplers share a batch, so samplers must compare and hash by value.
    """

    @property
    def temperature(self) -> float:
        """T in [0, 1]."""

    @property
    def most_draws(self) -> int:
        """Maximum number of draws in memory at once per row."""

    def sample(
        self, draw: Draw, num_rows: int, randomness: Randomness = None, reader: TokenReader | None = None
    ) -> ChunkSample:
        """Choose one chunk for every row.

        Args:
            draw: Makes draws.
            num_rows: Number of rows R.
            randomness: Randomness of the choice; the draws have their own.
            reader: Decodes draws that are not token ids; it affects the cost, not the result.
        """


@dataclass(frozen=True, kw_only=True)
class ExactSampler:
    """Samples chunks exactly from P^(1/T) if `max_draws` suffice, and by the pool rule otherwise.

    Args:
        temperature: T in (0, 1].
        max_draws: Maximum draws per row, at least 1/T; after that, the pool rule chooses among them.
        first_block: Draws in the first block; None for the default. Affects cost, not the distribution.
    """

    temperature: float = 1.0
    max_draws: int = 200
    first_block: int | None = None

    def __post_init__(self) -> None:
        order_for(self.temperature, self.max_draws, "max_draws=")
        check_counts(max_draws=self.max_draws, first_block=self.first_block)
        if self.temperature == 0:
            raise ValueError("exact sampling needs a temperature above 0; the pool rule also supports 0.")

    @property
    def most_draws(self) -> int:
        """See `Sampler`."""
        return 1 if self.temperature == 1 else self.max_draws

    def sample(
        self, draw: Draw, num_rows: int, randomness: Randomness = None, reader: TokenReader | None = None
    ) -> ChunkSample:
        """See `Sampler`; at T = 1 this is a single draw."""
        if self.temperature == 1:
            return single_draw(draw, num_rows, 1.0, reader)
        return sample_exact(
            draw,
            num_rows,
            self.temperature,
            max_draws=self.max_draws,
            first_block=self.first_block,
            randomness=randomness,
            reader=reader,
        )


@dataclass(frozen=True, kw_only=True)
class PoolSampler:
    """Chooses from a pool of draws by how often each chunk occurs; converges to P^(1/T) as the pool grows.

    Args:
        temperature: T in [0, 1]; 0 picks the most frequent chunk.
        num_draws: Size of the pool, at least 1/T.
        top_p: Keep the most frequent chunks that make up this share of the pool.
        min_p: Drop chunks whose frequency is below this fraction of the most frequent one's.
    """

    temperature: float = 1.0
    num_draws: int = 200
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        order_for(self.temperature, self.num_draws, "num_draws=")
        check_counts(num_draws=self.num_draws)
        check_cuts(self.top_p, self.min_p)

    @property
    def most_draws(self) -> int:
        """See `Sampler`."""
        is_cut = self.top_p < 1 or self.min_p > 0
        return 1 if self.temperature == 1 and not is_cut else self.num_draws

    def sample(
        self, draw: Draw, num_rows: int, randomness: Randomness = None, reader: TokenReader | None = None
    ) -> ChunkSample:
        """See `Sampler`; at T = 1, without top-p or min-p, this is a single draw."""
        if self.most_draws == 1:
            return single_draw(draw, num_rows, 1.0, reader)
        _check_rows(num_rows)
        pool = Pool(draw(self.num_draws, torch.arange(num_rows)), reader)
        return choose_from_pool(pool, pool.number(), self.temperature, randomness, self.top_p, self.min_p)


@dataclass(frozen=True, kw_only=True)
class HeadSampler:
    """One draw from a head that takes a temperature itself; the head defines the distribution.

    Args:
        temperature: From the head's `lowest_temperature` to 1.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        order_for(self.temperature)

    @property
    def most_draws(self) -> int:
        """See `Sampler`."""
        return 1

    def sample(
        self, draw: Draw, num_rows: int, randomness: Randomness = None, reader: TokenReader | None = None
    ) -> ChunkSample:
        """See `Sampler`."""
        return single_draw(draw, num_rows, self.temperature, reader)


def is_plain_draw(sampler: Sampler) -> bool:
    """Whether a sampler returns a single draw at temperature 1."""
    return sampler.temperature == 1 and sampler.most_draws == 1


def single_draw(draw: Draw, num_rows: int, temperature: float, reader: TokenReader | None) -> ChunkSample:
    """A sample of one draw per row."""
    _check_rows(num_rows)
    rows_R = torch.arange(num_rows)
    draws = draw(1, rows_R) if temperature == 1 else draw(1, rows_R, temperature)
    chunks_RK = draws[0] if reader is None else Pool(draws, reader).chunks(torch.zeros_like(rows_R), rows_R)
    ones_R = torch.ones(num_rows, dtype=torch.long, device=chunks_RK.device)
    return ChunkSample(chunks_RK, ones_R, ones_R, torch.zeros_like(ones_R, dtype=torch.bool), ones_R.double())


def check_counts(**numbers: int | None) -> None:
    """Raise ValueError for the first number that is below 1."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")


def _check_rows(num_rows: int) -> None:
    if num_rows < 1:
        raise ValueError("there is no row to sample: the batch is empty.")
