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
_ALONE = 16  # Prompts are read in pieces this many times larger while no row is being generated.


@dataclass(frozen=True)
class BatchLimits:
    """How much is held in memory and done at once.

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
        self._ready = [part for part in self._ready if _going(part)]
        self._open = self._open if self._rows else None

    def _read(self) -> list[Failed]:
        """Read a piece if there is a free slot, and let in rows that are ready."""
        failed: list[Failed] = []
        if len(self._reader) and len(self._rows) + self._num_ready < self._limits.max_rows:
            ready, failed = self._reader.read(self._limits.chunks_at_once * (1 if self._rows else _ALONE))
            self._ready += ready
        return [*failed, *self._let_in()]

    def _let_in(self) -> list[Failed]:
        """Give rows that are ready the slots of those that have ended, then free ones."""
        failed: list[Failed] = []
        for place, row in enumerate(() if self._open is None else self._open.rows):
            if row.has_ended and self._ready:
                failed += self._take_next(1, partial(self._replace, place))
        try:
            self._open = (
                self._open.part(_going(self._open)) if self._open is not None and self._rows else None
            )
        except Exception as error:
            logger.debug("finished rows stay in memory (%s)", reason_of(error))
        let_in: list[OpenRows] = []
        while self._ready and (free := self._limits.max_rows - len(self._rows) - _count(let_in)) > 0:
            failed += self._take_next(free, let_in.append)
        return [*failed, *self._join(let_in)]

    def _take_next(self, most: int, take: Callable[[OpenRows], None]) -> list[Failed]:
        """Let in the next rows that are ready, those of one prompt; if that fails, they alone leave."""
        part = self._ready[0]
        places = _going(part)
        try:
            rest = [part.part(places[most:])] if len(places) > most else []
            take(part.part(places[:most]))
        except Exception as error:
            failed = _leave([part.rows[place] for place in places[:most]], error)
            self._ready = [part for part in self._ready if _going(part)]
            return failed
        self._ready[:1] = rest
        return []

    def _replace(self, place: int, part: OpenRows) -> None:
        assert self._open is not None
        self._open = self._open.replaced(place, part)

    def _join(self, parts: Sequence[OpenRows]) -> list[Failed]:
        """Let rows in beside those being generated; if that fails for a prompt, its rows leave."""
        try:
            if parts:
                self._open = OpenRows.joined([*([] if self._open is None else [self._open]), *parts])
        except Exception as error:
            if len(parts) == 1:
                return _leave(parts[0].rows, error)
            return [one for part in parts for one in self._join([part])]
        return []

    def _write(self) -> list[Written | Failed]:
        if not self._rows:
            return []
        try:
            return [*self._advance()]
        except Exception as error:
            if len(self._rows) == 1:
                failed = _leave(self._rows, error)
                self._open = None
                return [*failed]
            logger.debug("a step of %d rows failed (%s)", len(self._rows), reason_of(error))
        assert self._open is not None
        failed = [one for place in _going(self._open) if (one := self._try_alone(place)) is not None]
        if not failed:
            return self._write_by_halves()
        for one in failed:
            one.row.has_ended = True
        return [*failed, *self._write()]

    def _advance(self) -> list[Written]:
        """Run a step that changes nothing if it fails."""
        assert self._open is not None
        rows, before = self._open, _Counts.of(self._open.rows)
        try:
            written_to = _going(rows)
            chunks_RK, written = self._sample(rows)
            places = _going(rows)
            ended = [place for place in written_to if rows.rows[place].has_ended]
            if len(ended) <= self._num_ready and all(rows.cache.has_room(place) for place in ended):
                chunks_RK[ended] = self._pad  # They keep their slots for others, and are read as padding.
                places = written_to
            if self._rows:
                self._open = self._read_chunks(rows.part(places), chunks_RK[places])
            elif not self._num_ready:
                self._open = None
        except Exception:
            before.restore()
            raise
        return written

    def _try_alone(self, place: int) -> Failed | None:
        """Run a step of one row and undo it; returns the failure, if any."""
        whole = self._open
        assert whole is not None
        before = _Counts.of(whole.rows)
        try:
            self._open = whole.part([place])
            self._advance()
        except Exception as error:
            return Failed(whole.rows[place], error)
        finally:
            self._open = whole
            before.restore()
        return None

    def _write_by_halves(self) -> list[Written | Failed]:
        whole = self._open
        assert whole is not None
        places = _going(whole)
        middle = len(places) // 2
        results: list[Written | Failed] = []
        left: list[OpenRows] = []
        for half in (places[:middle], places[middle:]):
            try:
                self._open = whole.part(half)
            except Exception as error:
                results += _leave([whole.rows[place] for place in half], error)
                continue
            results += self._write()
            left += [self._open] if self._open is not None and self._rows else []
        self._open = left[0] if left else None
        try:
            self._open = OpenRows.joined(left) if left else None
        except Exception as error:
            logger.debug("half of the rows are waiting for memory (%s)", reason_of(error))
            self._ready[:0] = left[1:]
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
        going = _going(rows)
        hidden_RD = rows.hidden_RD if len(going) == len(rows.rows) else rows.hidden_RD[going]
        if not bool(hidden_RD.isfinite().all()):  # Not every head would notice.
            raise ValueError("the model's hidden state is not finite; its weights may be damaged.")
        for sampler, places in self._turns(rows.rows):
            generators = [rows.rows[place].generator for place in places]
            is_whole = len(places) == len(rows.rows)
            hidden_AD = rows.hidden_RD if is_whole else rows.hidden_RD[places]
            sample = self._model.sample_chunks(hidden_AD, sampler, generators, self._steps.compiled)
            chunk_AK, ends_A = end_after_eos(sample.chunks_RK, self._eos_ids, self._pad)
            chunks_RK[places] = chunk_AK
            for place, *one in zip(places, *_listed(chunk_AK, ends_A, sample), strict=True):
                written[place] = self._note(rows.rows[place], *one)
        return chunks_RK, [one for one in written if one is not None]

    def _turns(self, rows: Sequence[Row]) -> Iterator[tuple[Sampler, list[int]]]:
        """Indices of rows to sample together: with equal samplers, and not too many draws."""
        going = [place for place, row in enumerate(rows) if not row.has_ended]
        for sampler in dict.fromkeys(rows[place].sampler for place in going):
            places = [place for place in going if rows[place].sampler == sampler]
            most = max(1, self._limits.draws_at_once // sampler.most_draws)
            yield from ((sampler, places[first : first + most]) for first in range(0, len(places), most))

    def _note(
        self, row: Row, tokens: list[int], ends: bool, num_draws: int, agreement: float, fell_back: bool
    ) -> Written:
        """Count a chunk of a row, and return what of it is text."""
        if ends:
            tokens = tokens[: next(place for place, token in enumerate(tokens, 1) if token in self._ends)]
        by_eos = ends and len(tokens) <= row.budget
        tokens = tokens[: row.budget]
        row.budget -= len(tokens)
        row.has_ended = by_eos or row.budget == 0
        end: Literal["eos", "budget"] | None = "eos" if by_eos else "budget" if row.has_ended else None
        return Written(row, tokens, end, num_draws, agreement, fell_back)


def _going(rows: OpenRows) -> list[int]:
    """Indices of the rows that have not ended."""
    return [place for place, row in enumerate(rows.rows) if not row.has_ended]


def _count(parts: Sequence[OpenRows]) -> int:
    return sum(len(_going(part)) for part in parts)


def _leave(rows: Sequence[Row], error: Exception) -> list[Failed]:
    """Mark rows as ended because of an error."""
    for row in rows:
        row.has_ended = True
    return [Failed(row, error) for row in rows]


class _Counts(NamedTuple):
    """The state of the rows that a step changes, to restore if it fails."""

    rows: Sequence[Row]
    counts: list[tuple[int, bool, Tensor]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "_Counts":
        """The current state."""
        return cls(rows, [(row.budget, row.has_ended, row.generator.get_state()) for row in rows])

    def restore(self) -> None:
        """Restore the rows to this state."""
        for row, (budget, has_ended, state) in zip(self.rows, self.counts, strict=True):
            row.budget, row.has_ended = budget, has_ended
            row.generator.set_state(state)


def _listed(chunk_AK: Tensor, ends_A: Tensor, sample: ChunkSample) -> list[list]:
    """What is reported of each row, as Python numbers."""
    tensors = (chunk_AK, ends_A, sample.num_draws_R, sample.agreement_R, sample.fell_back_R)
    return [values_A.tolist() for values_A in tensors]
