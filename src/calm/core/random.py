"""Random numbers from one generator, or from one generator per row.

If each row has its own generator, its numbers do not depend on the other rows, so the same
seed gives the same text alone and in a batch. Shapes: N draws, R rows, U numbers.
"""

import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from calm.core.seeds import as_seed


class DrawsInParts:
    """Randomness for N draws that are made in parts, with the same result as if made all at once.

    The caller must request numbers in the same order for every part.

    Args:
        num_draws: Total number of draws N.
        generators: One generator per row.
    """

    def __init__(self, num_draws: int, generators: Sequence[torch.Generator]) -> None:
        self._num_draws, self._generators = num_draws, generators
        self._first, self._num_requests = 0, 0  # Of the current part.
        self._numbers: list[Tensor] = []  # Of all N draws: (N, R, U) for each request.

    def begin(self, first: int) -> "DrawsInParts":
        """Start the part whose first draw is `first`."""
        self._first, self._num_requests = first, 0
        return self

    def next(self, num_draws: int, make: Callable[[int, Sequence[torch.Generator]], Tensor]) -> Tensor:
        """Numbers for the `num_draws` draws of the part: a slice of what `make` returns for all N draws."""
        if self._num_requests == len(self._numbers):
            self._numbers.append(make(self._num_draws, self._generators))
        numbers_NRU = self._numbers[self._num_requests]
        self._num_requests += 1
        return numbers_NRU[self._first : self._first + num_draws]


class Request(NamedTuple):
    """Random numbers that a draw requests: (N, R, `size`), from `torch.rand` or `torch.randn`."""

    function: Callable[..., Tensor]
    size: int
    dtype: torch.dtype


class RequestRecorder:
    """Randomness that records requests; the numbers come from the default generator."""

    def __init__(self) -> None:
        self.requests: list[Request] = []


class PredrawnNumbers:
    """Numbers drawn in advance, (N, R, U) each, returned in the order of requests.

    Args:
        numbers: One tensor for each future request, in its shape.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self._numbers = iter(numbers)

    def next(self) -> Tensor:
        """The numbers for the next request."""
        return next(self._numbers)


Randomness = (
    torch.Generator | Sequence[torch.Generator] | DrawsInParts | RequestRecorder | PredrawnNumbers | None
)
"""One generator for all rows, one per row, draws in parts, or None for the default generator; or a recorder
of requests, or given numbers (see `numbers_for`)."""


def numbers_for(
    requests: Sequence[Request],
    num_draws: int,
    num_rows: int,
    randomness: Randomness,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """The numbers, (N, R, size) each, that a draw making these requests would get.

    This splits a draw into its random numbers and a deterministic function of them (see `RequestRecorder` and
    `PredrawnNumbers`).
    """
    return [
        _generate(request.function, num_draws, num_rows, request.size, randomness, device, request.dtype)
        for request in requests
    ]


def uniform(
    num_draws: int,
    num_rows: int,
    size: int,
    randomness: Randomness = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1), shape (N, R, U)."""
    return _generate(torch.rand, num_draws, num_rows, size, randomness, device, dtype)


def normal(
    num_draws: int,
    num_rows: int,
    size: int,
    randomness: Randomness = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers, shape (N, R, U)."""
    return _generate(torch.randn, num_draws, num_rows, size, randomness, device, dtype)


def _generate(
    function: Callable[..., Tensor],
    num_draws: int,
    num_rows: int,
    size: int,
    randomness: Randomness,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    if isinstance(randomness, PredrawnNumbers):
        return randomness.next()
    if isinstance(randomness, RequestRecorder):
        randomness.requests.append(Request(function, size, dtype))
        randomness = None
    if isinstance(randomness, DrawsInParts):
        return randomness.next(
            num_draws,
            lambda total, generators: _generate(function, total, num_rows, size, generators, device, dtype),
        )
    if isinstance(randomness, Sequence):
        if len(randomness) != num_rows:
            raise ValueError(f"there are {num_rows} rows, but {len(randomness)} generators.")
        numbers_RNU = torch.empty(num_rows, num_draws, size, device=device, dtype=dtype)
        fill = Tensor.uniform_ if function is torch.rand else Tensor.normal_
        for row_NU, generator in zip(numbers_RNU.unbind(0), randomness, strict=True):
            fill(row_NU, generator=generator)
        return numbers_RNU.transpose(0, 1)
    shape_NRU = (num_draws, num_rows, size)
    return function(shape_NRU, generator=randomness, device=device, dtype=dtype)


def select_rows(randomness: Randomness, rows_R: Tensor) -> Randomness:
    """The generators of some rows; anything but one generator per row is returned unchanged."""
    if isinstance(randomness, Sequence):
        return [randomness[row] for row in rows_R.tolist()]
    return randomness


def seed_of(*parts: object) -> int:
    """Hash numbers and strings to a seed."""
    plain = tuple(as_seed(part) if isinstance(part, SupportsIndex) else part for part in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=7).digest()  # torch takes at most 63 bits.
    return int.from_bytes(digest, "big")


def generators_of_rows(
    seed: int, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """A generator per row, seeded by the user's seed, the row's tokens, and how many equal rows precede it.

    So a prompt has the same random stream in every batch, and equal prompts have different ones.

    Args:
        seed: The user's seed.
        rows: Tokens of each row, without padding.
        device: Device of the generators.

    Raises:
        ValueError: If the seed is not an integer.
    """
    seen: dict[tuple[int, ...], int] = {}
    generators = []
    for row in map(_plain, rows):
        copy = seen[row] = seen.get(row, -1) + 1
        generators.append(generator_of_row(seed, row, copy, device))
    return generators


def generator_of_row(
    seed: int, row: Sequence[int], copy: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator that `generators_of_rows` gives a row.

    Args:
        seed: The user's seed.
        row: Its tokens, without padding.
        copy: How many equal rows precede it.
        device: Device of the generator.

    Raises:
        ValueError: If the seed is not an integer.
    """
    # The hash is of a repr, and numpy and torch integers have another repr than Python's.
    text = repr((as_seed(seed), operator.index(copy), _plain(row)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # manual_seed takes at most 63 bits without wrapping.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def _plain(row: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(operator.index, row))
