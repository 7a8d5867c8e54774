"""Continuous batching: rows are generated together, join and leave at any chunk, and are independent.

Shapes: R rows, K tokens per chunk, A rows that are sampled together, D state size.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calm.core.chunks import as_id_tensor, end_after_eos
from calm.core.random import generator_of_row
from calm.core.samplers import Sampler
from calm.core.temperature import ChunkSample
from calm.errors import reason_of
from calm.models.generation.model import ChunkModel
from calm.models.generation.prefixes import PrefixStore
from calm.models.generation.reading import PromptReader
from calm.models.generation.rows import Failed, OpenRows, Row, Written
from calm.models.generation.steps import SlotSteps
from calm.models.thoughts import Thoughts

logger = logging.getLogger(__name__)
_IDLE_FACTOR = 16  # Prompts are read in pieces this many times larger while no row is being generated.


@dataclass(frozen=True)
class BatchLimits:
    """How much is in memory and done at once.

    Args:
        max_rows: Rows that are generated at the same time; others wait, possibly with prompts already read.
        draws_at_once: Draws over all rows; rows that may exceed this are sampled in turns.
        chunks_at_once: Chunks of prompts that are read between two steps of the rows.
        prefix_bytes: Memory for the prefix cache.
    """

    max_rows: int = 64
    draws_at_once: int = 4096
    chunks_at_once: int = 128
    prefix_bytes: int = 1 << 28


class ChunkBatch:
    """Generates one chunk for every row at each step.

    Steps also read the prompts, in pieces; see `PromptReader`. If rows wait for a slot, several prompts are
    read together once one is free. With the same seed, a row gets the text that `generate` gives for its
    prompt alone, up to rounding, which differs between batch shapes.

    A step that fails leaves every row and its randomness unchanged. Then the rows that fail alone leave, and
    the others continue without them; if none fails alone, as when memory is short, they continue in halves.
    A row that fails to join leaves alone, too.

    Args:
        model: The model, whose layers and weights must not change.
        limits: How much is done at once; None for the default.
    """

    def __init__(self, model: ChunkModel, limits: BatchLimits | None = None) -> None:
        limits = limits or BatchLimits()
        self._model, self._limits = model, limits
        self._steps = SlotSteps(model)
        self._reader = PromptReader(model, PrefixStore(limits.prefix_bytes))
        self._open: OpenRows | None = None
        self._ready: list[OpenRows] = []  # Prompts that have been read, whose rows wait for a slot.
        self._eos_ids = as_id_tensor(model.config.eos_token_id, model.device)
        self._ends = set(self._eos_ids.tolist())
        self._pad = model.config.pad_token_id or 0

    def __len__(self) -> int:
        return len(self._rows) + self._num_ready + len(self._reader)

    @property
    def _rows(self) -> Sequence[Row]:
        """Rows that are being generated, without those that wait."""
        return () if self._open is None else [row for row in self._open.rows if not row.has_ended]

    @property
    def _num_ready(self) -> int:
        return _count(self._ready)

    def join(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        budget: int,
        seed: int,
        copy: int = 0,
        thoughts: Thoughts | None = None,
    ) -> Row:
        """Add a row; the next steps read its prompt, and generate its text as soon as a slot is free.

        Args:
            prompt: Its tokens, at least one.
            sampler: How chunks are sampled.
            budget: Maximum number of new tokens, at least 1.
            seed: Determines the text, together with the prompt and the copy.
            copy: Which of several texts with the same prompt and seed, as of `num_return_sequences`.
            thoughts: Thoughts after the prompt.
        """
        row = Row(sampler, budget, generator_of_row(seed, prompt, copy, self._model.device))
        self._reader.add(row, prompt, thoughts)
        return row

    @torch.no_grad()
    def step(self) -> list[Written | Failed]:
        """Read a piece of the prompts, and generate a chunk for every row; those that end or fail leave."""
        return [*self._read(), *self._write()]

    @torch.no_grad()
    def drop(self, row: Row) -> None:
        """Remove a row before its end; it may have left already."""
        self._reader.drop(row)
        row.has_ended = True  # It keeps its slot until another row needs it, or no other is left.
        self._ready = [part for part in self._ready if _active(part)]
        self._open = self._open if self._rows else None

    def _read(self) -> list[Failed]:
        """Read a piece if there is a free slot, and admit rows that are ready."""
        failed: list[Failed] = []
        if len(self._reader) and len(self._rows) + self._num_ready < self._limits.max_rows:
            factor = 1 if self._rows else _IDLE_FACTOR
            ready, failed = self._reader.read(self._limits.chunks_at_once * factor)
            self._ready += ready
        return [*failed, *self._admit()]

    def _admit(self) -> list[Failed]:
        """Give rows that are ready the slots of those that have ended, then free ones."""
        failed: list[Failed] = []
        for index, row in enumerate(() if self._open is None else self._open.rows):
            if row.has_ended and self._ready:
                failed += self._admit_next(1, partial(self._replace, index))
        try:
            self._open = (
                self._open.select(_active(self._open)) if self._open is not None and self._rows else None
            )
        except Exception as error:
            logger.warning("finished rows stay in memory (%s)", reason_of(error))
        admitted: list[OpenRows] = []
        while self._ready and (free := self._limits.max_rows - len(self._rows) - _count(admitted)) > 0:
            failed += self._admit_next(free, admitted.append)
        return [*failed, *self._append(admitted)]

    def _admit_next(self, max_rows: int, admit: Callable[[OpenRows], None]) -> list[Failed]:
        """Admit the next rows that are ready, all of one prompt; if that fails, they alone leave."""
        part = self._ready[0]
        indices = _active(part)
        try:
            remaining = [part.select(indices[max_rows:])] if len(indices) > max_rows else []
            admit(part.select(indices[:max_rows]))
        except Exception as error:
            failed = _fail([part.rows[index] for index in indices[:max_rows]], error)
            self._ready = [part for part in self._ready if _active(part)]
            return failed
        self._ready[:1] = remaining
        return []

    def _replace(self, index: int, part: OpenRows) -> None:
        assert self._open is not None
        self._open = self._open.with_row(index, part)

    def _append(self, parts: Sequence[OpenRows]) -> list[Failed]:
        """Add rows to those being generated; if that fails for a prompt, its rows leave."""
        try:
            if parts:
                self._open = OpenRows.concat([*([] if self._open is None else [self._open]), *parts])
        except Exception as error:
            if len(parts) == 1:
                return _fail(parts[0].rows, error)
            return [failure for part in parts for failure in self._append([part])]
        return []

    def _write(self) -> list[Written | Failed]:
        if not self._rows:
            return []
        try:
            return [*self._advance()]
        except Exception as error:
            if len(self._rows) == 1:
                failed = _fail(self._rows, error)
                self._open = None
                return [*failed]
            logger.warning("a step of %d rows failed (%s)", len(self._rows), reason_of(error))
        assert self._open is not None
        tried = [self._try_alone(index) for index in _active(self._open)]
        failed = [failure for failure in tried if failure is not None]
        if not failed:
            return self._write_in_halves()
        for failure in failed:
            failure.row.has_ended = True
        return [*failed, *self._write()]

    def _advance(self) -> list[Written]:
        """Run a step that changes nothing if it fails."""
        assert self._open is not None
        rows, snapshot = self._open, _Snapshot.of(self._open.rows)
        try:
            sampled = _active(rows)
            chunks_RK, written = self._sample(rows)
            remaining = _active(rows)
            ended = [index for index in sampled if rows.rows[index].has_ended]
            if len(ended) <= self._num_ready and all(rows.cache.has_room(index) for index in ended):
                chunks_RK[ended] = self._pad  # They keep their slots for others, and are read as padding.
                remaining = sampled
            if self._rows:
                self._open = self._read_chunks(rows.select(remaining), chunks_RK[remaining])
            elif not self._num_ready:
                self._open = None
        except Exception:
            snapshot.restore()
            raise
        return written

    def _try_alone(self, index: int) -> Failed | None:
        """Run a step of one row and undo it; returns the failure, if any."""
        rows = self._open
        assert rows is not None
        snapshot = _Snapshot.of(rows.rows)
        try:
            self._open = rows.select([index])
            self._advance()
        except Exception as error:
            return Failed(rows.rows[index], error)
        finally:
            self._open = rows
            snapshot.restore()
        return None

    def _write_in_halves(self) -> list[Written | Failed]:
        rows = self._open
        assert rows is not None
        indices = _active(rows)
        middle = len(indices) // 2
        results: list[Written | Failed] = []
        remaining: list[OpenRows] = []
        for half in (indices[:middle], indices[middle:]):
            try:
                self._open = rows.select(half)
            except Exception as error:
                results += _fail([rows.rows[index] for index in half], error)
                continue
            results += self._write()
            remaining += [self._open] if self._open is not None and self._rows else []
        self._open = remaining[0] if remaining else None
        try:
            self._open = OpenRows.concat(remaining) if remaining else None
        except Exception as error:
            logger.warning("half of the rows are waiting for memory (%s)", reason_of(error))
            self._ready[:0] = remaining[1:]
        return results

    def _read_chunks(self, rows: OpenRows, chunks_RK: Tensor) -> OpenRows:
        """The same rows after reading their new chunks."""
        cache = rows.cache.shared()
        states_RD = self._steps.advance(chunks_RK, cache)
        return OpenRows(rows.rows, states_RD, cache)

    def _sample(self, rows: OpenRows) -> tuple[Tensor, list[Written]]:
        """Sample the next chunk of every row that has not ended, (R, K), in groups of equal samplers."""
        size = self._model.config.chunk_size
        chunks_RK = torch.full((len(rows.rows), size), self._pad, device=self._model.device)
        written: list[Written | None] = [None] * len(rows.rows)
        if not bool(_select(rows.hidden_RD, _active(rows)).isfinite().all()):  # Not every head would notice.
            raise ValueError("the model's hidden state is not finite; its weights may be damaged.")
        for sampler, indices in self._groups(rows):
            generators = [rows.rows[index].generator for index in indices]
            hidden_AD = _select(rows.hidden_RD, indices)
            sample = self._model.sample_chunks(hidden_AD, sampler, generators, self._steps.compiled)
            chunk_AK, ends_A = end_after_eos(sample.chunks_RK, self._eos_ids, self._pad)
            chunks_RK[indices] = chunk_AK
            for index, *values in zip(indices, *_as_lists(chunk_AK, ends_A, sample), strict=True):
                written[index] = self._record(rows.rows[index], *values)
        return chunks_RK, [result for result in written if result is not None]

    def _groups(self, rows: OpenRows) -> Iterator[tuple[Sampler, list[int]]]:
        """Indices of rows to sample together: with equal samplers, and not too many draws."""
        active = _active(rows)
        for sampler in dict.fromkeys(rows.rows[index].sampler for index in active):
            indices = [index for index in active if rows.rows[index].sampler == sampler]
            size = max(1, self._limits.draws_at_once // sampler.most_draws)
            yield from ((sampler, indices[first : first + size]) for first in range(0, len(indices), size))

    def _record(
        self, row: Row, tokens: list[int], ends: bool, num_draws: int, agreement: float, fell_back: bool
    ) -> Written:
        """Subtract a chunk from a row's budget, and return it without what follows the end of the text."""
        if ends:
            tokens = tokens[: next(length for length, token in enumerate(tokens, 1) if token in self._ends)]
        by_eos = ends and len(tokens) <= row.budget
        tokens = tokens[: row.budget]
        row.budget -= len(tokens)
        row.has_ended = by_eos or row.budget == 0
        end: Literal["eos", "budget"] | None = "eos" if by_eos else "budget" if row.has_ended else None
        return Written(row, tokens, end, num_draws, agreement, fell_back)


def _active(rows: OpenRows) -> list[int]:
    """Indices of the rows that have not ended."""
    return [index for index, row in enumerate(rows.rows) if not row.has_ended]


def _count(parts: Sequence[OpenRows]) -> int:
    """Number of rows that have not ended."""
    return sum(len(_active(part)) for part in parts)


def _select(states_RD: Tensor, indices: Sequence[int]) -> Tensor:
    """The states of some rows; without a copy if these are all of them."""
    return states_RD if len(indices) == len(states_RD) else states_RD[indices]


def _fail(rows: Sequence[Row], error: Exception) -> list[Failed]:
    """Mark rows as ended because of an error."""
    for row in rows:
        row.has_ended = True
    return [Failed(row, error) for row in rows]


class _Snapshot(NamedTuple):
    """What a step changes of its rows, to restore if it fails."""

    rows: Sequence[Row]
    states: list[tuple[int, bool, Tensor]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "_Snapshot":
        """The current state."""
        return cls(rows, [(row.budget, row.has_ended, row.generator.get_state()) for row in rows])

    def restore(self) -> None:
        """Restore the rows to this state."""
        for row, (budget, has_ended, state) in zip(self.rows, self.states, strict=True):
            row.budget, row.has_ended = budget, has_ended
            row.generator.set_state(state)


def _as_lists(chunk_AK: Tensor, ends_A: Tensor, sample: ChunkSample) -> list[list]:
    """What is reported of each row, as Python numbers: a list per quantity."""
    tensors = (chunk_AK, ends_A, sample.num_draws_R, sample.agreement_R, sample.fell_back_R)
    return [values_A.tolist() for values_A in tensors]
