"""Prefill: prompts of rows that join are read together and in pieces, so that a long one blocks nobody.

Shapes: R rows, C chunks, K tokens per chunk, D state size.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from calm.core.chunks import positions_of, split_into_chunks
from calm.models.generation.model import ChunkModel
from calm.models.generation.prefixes import PrefixStore, block_names
from calm.models.generation.prompts import Prompt, read_chunks
from calm.models.generation.rows import Failed, OpenRows, Row
from calm.models.generation.slots import SlotCache
from calm.models.thoughts import THOUGHT, Thoughts, num_at_once

_MAX_BEGUN = 4  # Prompts that are partly read.
_OLDEST_EVERY = 4  # Pieces until one starts with the prompt that has waited longest.


@dataclass(eq=False)
class _Reading:
    """A prompt, and how far it has been read.

    Args:
        tokens: The prompt as it was given, and its thoughts.
        chunks_CK: The same in chunks.
        rows: The rows that it is read for.
        cache: What has been read, a single row; None for nothing.
        hidden_1D: The state after that.
    """

    tokens: tuple[int, ...]
    chunks_CK: Tensor
    rows: list[Row]
    cache: SlotCache | None = None
    hidden_1D: Tensor | None = None

    def __post_init__(self) -> None:
        is_thought_C = (self.chunks_CK == THOUGHT).any(-1)
        self.num_thoughts = int(is_thought_C.sum())
        # What comes before the first thought does not depend on any.
        first = int(is_thought_C.int().argmax()) if self.num_thoughts else len(is_thought_C)
        self.plain_CK = self.chunks_CK[:first]

    @cached_property
    def names(self) -> list[bytes]:
        """Names of the blocks that may be in the prefix cache."""
        return [*block_names(self.plain_CK[:-1])]

    @property
    def num_left(self) -> int:
        """Chunks still to be read."""
        return len(self.chunks_CK) - (0 if self.cache is None else self.cache.lengths[0])

    def piece(self, max_chunks: int) -> Tensor:
        """The next chunks, at most `max_chunks`, few of them thoughts: each thought takes a separate pass.

        A prompt's thoughts are at the end of a piece, or just before the marker there. So the thoughts of
        several prompts that are read side by side take hardly more passes than those of one.
        """
        left_CK = self.chunks_CK[len(self.chunks_CK) - self.num_left :][:max_chunks]
        return left_CK[: num_at_once((left_CK == THOUGHT).any(-1))] if self.num_thoughts else left_CK


class PromptReader:
    """Prompts that wait to be read, in order of arrival.

    A piece starts with the prompt that has the least left: short ones overtake, and those in progress are
    finished. Every fourth piece starts with the prompt that has waited longest, so a long one of n pieces
    waits for at most 4n from then on. At most four are partly read in memory, including that one: while three
    others are in progress, more are read only if they fit into one piece.

    Equal prompts that wait at the same time are read once, and so are prefixes that were read before.

    Args:
        model: The model.
        prefixes: The prefix cache.
    """

    def __init__(self, model: ChunkModel, prefixes: PrefixStore) -> None:
        self._model, self._prefixes = model, prefixes
        self._queue: deque[_Reading] = deque()
        self._num_pieces = 0

    def __len__(self) -> int:
        """Number of rows that wait."""
        return sum(len(reading.rows) for reading in self._queue)

    def add(self, row: Row, prompt: Sequence[int], thoughts: Thoughts | None = None) -> None:
        """Add a prompt of at least one token, and its thoughts."""
        size = self._model.config.chunk_size
        tokens = (*prompt, *(() if thoughts is None else thoughts.tokens(size)))
        for reading in self._queue:
            if reading.tokens == tokens:
                reading.rows.append(row)
                return
        ids_T = Prompt.of(self._model, prompt).followed_by(thoughts, size).ids_BT[0]
        self._queue.append(_Reading(tokens, split_into_chunks(ids_T, size), [row]))

    def drop(self, row: Row) -> None:
        """Remove a row, if it waits here."""
        for reading in self._queue:
            reading.rows = [other for other in reading.rows if other is not row]
        self._queue = deque(reading for reading in self._queue if reading.rows)

    def read(self, chunks_at_once: int) -> tuple[list[OpenRows], list[Failed]]:
        """Read a piece; returns rows whose prompts are complete, and those that could not be read.

        Args:
            chunks_at_once: Chunks of all prompts in the piece together, including padding.
        """
        chosen, failed = self._next(chunks_at_once), []
        try:
            self._read(chosen, chunks_at_once)
        except Exception as error:
            for reading in chosen:
                known_error = error if len(chosen) == 1 else None
                if final_error := self._try_alone(reading, chunks_at_once, known_error):
                    failed += [Failed(row, final_error) for row in reading.rows]
                    self._queue.remove(reading)
        ready: list[OpenRows] = []
        for reading in chosen:
            if reading not in self._queue or reading.num_left:
                continue
            self._queue.remove(reading)
            try:
                ready.append(self._opened(reading))
            except Exception as error:
                failed += [Failed(row, error) for row in reading.rows]
        return ready, failed

    def _next(self, chunks_at_once: int) -> list[_Reading]:
        """The first prompt in turn, and as many of the next as fit beside it, in the order of the queue."""
        chosen: list[_Reading] = []
        longest = 0
        for num_left, reading in self._in_turn(chunks_at_once):
            longest = max(longest, num_left)
            if chosen and longest * (len(chosen) + 1) > chunks_at_once:
                break
            chosen.append(reading)
        for reading in chosen:
            if reading.cache is None:
                reading.cache = self._prefixes.find(reading.plain_CK)
        return [reading for reading in self._queue if reading in chosen]

    def _in_turn(self, chunks_at_once: int) -> list[tuple[int, _Reading]]:
        """Prompts that may be read now, in turn, each with the number of chunks that it takes."""
        oldest, *others = ((self._num_uncached(reading), reading) for reading in self._queue)
        may_begin = sum(reading.cache is not None for _, reading in others) < _MAX_BEGUN - 1
        others = [
            (num_left, reading)
            for num_left, reading in others
            if may_begin or num_left <= chunks_at_once or reading.cache is not None
        ]
        self._num_pieces += 1
        if self._num_pieces % _OLDEST_EVERY == 0:
            return [oldest, *sorted(others, key=itemgetter(0))]
        return sorted([oldest, *others], key=itemgetter(0))

    def _num_uncached(self, reading: _Reading) -> int:
        """Chunks of a prompt that are still to be read and not in the prefix cache."""
        return reading.num_left - (self._prefixes.num_cached(reading.names) if reading.cache is None else 0)

    def _try_alone(
        self, reading: _Reading, max_chunks: int, known_error: Exception | None
    ) -> Exception | None:
        """Read a prompt alone, unless it is known to fail; returns the error if it cannot be read."""
        if known_error is None and reading.num_left:
            try:
                self._read([reading], max_chunks)
            except Exception as error:
                return error
        return known_error

    def _read(self, readings: Sequence[_Reading], max_chunks: int) -> None:
        pieces = [reading.piece(max_chunks) for reading in readings]
        caches = [reading.cache for reading in readings]
        may_think = any(reading.num_thoughts for reading in readings)
        before = [reading.hidden_1D for reading in readings] if may_think else None
        states_RD, cache = prefill(self._model, pieces, caches, before)
        # All parts before any is stored: after a failure they are read again, and nothing may be read twice.
        parts = [cache.select([row]) for row in range(len(readings))]
        for row, reading in enumerate(readings):
            reading.cache, reading.hidden_1D = parts[row], states_RD[row : row + 1]

    def _opened(self, reading: _Reading) -> OpenRows:
        """Open the rows of a prompt that has been read, and cache its prefix for others."""
        assert reading.cache is not None and reading.hidden_1D is not None
        if bool(reading.hidden_1D.isfinite().all()):
            self._prefixes.keep(reading.plain_CK, reading.cache)
        copies = [0] * len(reading.rows)
        return OpenRows(reading.rows, reading.hidden_1D[copies], reading.cache.select(copies))


def prefill(
    model: ChunkModel,
    pieces: Sequence[Tensor],
    caches: Sequence[SlotCache | None],
    before: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, SlotCache]:
    """Read pieces (C, K) of several prompts; returns the states (R, D) after them, and the joint cache.

    Args:
        model: The model.
        pieces: The pieces.
        caches: What has been read of each prompt before.
        before: The last state of each, (1, D), if there may be thoughts.
    """
    longest, device = max(len(piece) for piece in pieces), pieces[0].device
    # Padding in front: the last state of every row is in the last column.
    ids_RT = pad_sequence(list(pieces), batch_first=True, padding_side="left").flatten(1)
    column_C = torch.arange(longest, device=device)
    mask_RC = torch.stack([column_C >= longest - len(piece) for piece in pieces]).long()
    position_RC = positions_of(mask_RC)
    filled = next((cache for cache in caches if cache is not None), None)
    if filled is None:
        joint = DynamicCache(config=model.config.backbone)
    else:
        slots = SlotCache.concat([filled.empty_row() if cache is None else cache for cache in caches])
        joint, mask_before_RC = slots.to_transformers(model.config.backbone)
        position_RC = position_RC + torch.tensor(slots.lengths, device=device).unsqueeze(-1)
        mask_RC = torch.cat([mask_before_RC.to(device), mask_RC], dim=1)
    before_RD = None
    if given := [state_1D for state_1D in before or () if state_1D is not None]:
        empty_1D = torch.zeros_like(given[0])
        before_RD = torch.cat([empty_1D if state_1D is None else state_1D for state_1D in before or ()])
    states_RCD = read_chunks(
        model, ids_RT, mask_RC, position_RC, joint, may_think=before is not None, state_before=before_RD
    )
    return states_RCD[:, -1], SlotCache.of(joint, mask_RC)
