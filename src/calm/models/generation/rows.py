"""Texts that are generated together, and the state of each.

Shapes: R rows, D state size, K tokens per chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from calm.models.generation.slots import SlotCache


@dataclass(eq=False)
class Row:
    """A text that is being generated.

    Args:
        sampler: How it is sampled: a `Sampler` of chunks, or what a batch other than `ChunkBatch` takes.
        budget: Tokens that may still be generated.
        generator: Source of its randomness.
        has_ended: Whether it has left.
    """

    sampler: Any
    budget: int
    generator: torch.Generator
    has_ended: bool = False


@dataclass(frozen=True)
class Written:
    """What a step generated for a row.

    Args:
        row: The row.
        tokens: Its new tokens, EOS included; at most K in a `ChunkBatch`.
        ended_by: "eos" or "budget" with the last chunk of the row.
        num_draws: Draws that were made.
        agreement: Share of the draws that are equal to the chunk.
        fell_back: Whether the budget of draws was used up.
    """

    row: Row
    tokens: list[int]
    ended_by: Literal["eos", "budget"] | None
    num_draws: int
    agreement: float
    fell_back: bool


@dataclass(frozen=True)
class Failed:
    """A row that could not be read or generated, and has been removed.

    Args:
        row: The row.
        error: Why.
    """

    row: Row
    error: Exception


@dataclass(frozen=True)
class OpenRows:
    """Rows whose next chunk can be sampled. Methods return a new one and leave this one unchanged.

    Args:
        rows: The rows, at least one.
        hidden_RD: The state that predicts the next chunk of each.
        cache: The keys and values of each.
    """

    rows: Sequence[Row]
    hidden_RD: Tensor
    cache: SlotCache

    @classmethod
    def concat(cls, parts: Sequence["OpenRows"]) -> "OpenRows":
        """Concatenate the rows of several."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            [row for part in parts for row in part.rows],
            torch.cat([part.hidden_RD for part in parts]),
            SlotCache.concat([part.cache for part in parts]),
        )

    def with_row(self, index: int, other: "OpenRows") -> "OpenRows":
        """Put a single row in the slot of one that has ended, whose memory it takes over.

        Args:
            index: Index of the row that has ended.
            other: The new row.
        """
        hidden_RD, cache = self.hidden_RD.clone(), self.cache.shared()
        hidden_RD[index] = other.hidden_RD[0]
        cache.put(index, other.cache)
        return OpenRows([*self.rows[:index], *other.rows, *self.rows[index + 1 :]], hidden_RD, cache)

    def select(self, indices: Sequence[int]) -> "OpenRows":
        """Some of the rows, in their order."""
        if len(indices) == len(self.rows):
            return self
        index_R = torch.tensor(indices, dtype=torch.long, device=self.hidden_RD.device)
        return OpenRows(
            [self.rows[index] for index in indices], self.hidden_RD[index_R], self.cache.select(indices)
        )
