"""Rows that are written together, join and leave at any chunk, and know nothing of each other.

Shapes: R rows, C chunks in the cache, K tokens per chunk, D hidden size.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_columns
from transformers.cache_utils import DynamicCache

from calm.core.chunks import as_id_tensor, end_after_eos
from calm.core.random import generator_of_row
from calm.core.samplers import Sampler
from calm.core.temperature import ChunkSample
from calm.errors import reason_of
from calm.models.writing.model import ChunkModel
from calm.models.writing.prompts import Prompt, read_chunks

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Row:
    """A text that is being written.

    Args:
        sampler: How its chunks are sampled.
        budget: Tokens that may still be written.
        generator: Source of its randomness.
        position: Position of its next chunk.
        has_ended: Whether it has left.
    """

    sampler: Sampler
    budget: int
    generator: torch.Generator
    position: int
    has_ended: bool = False


@dataclass(frozen=True)
class Written:
    """What a step wrote for a row.

    Args:
        row: The row.
        tokens: Its new tokens, EOS included, at most K.
        ended_by: "eos" or "budget" with the last chunk of the row.
        num_draws: Draws that were made.
        agreement: Share of the draws that are equal to the chunk.
        fell_back: Whether the budget of draws was spent.
    """

    row: Row
    tokens: list[int]
    ended_by: Literal["eos", "budget"] | None
    num_draws: int
    agreement: float
    fell_back: bool


@dataclass(frozen=True)
class Failed:
    """A row that a step could not write, and has let go.

    Args:
        row: The row.
        error: Why.
    """

    row: Row
    error: Exception


class ChunkBatch:
    """Writes all its rows one chunk further at each step.

    A prompt is read when its row joins, alone, with a cache of its own; then the caches are put together with
    padding in front. With the same seed a row gets the text that `generate` gives its prompt alone, but for
    rounding, which differs between the shapes of a batch.

    A step that fails leaves every row and its randomness as they were. Then the rows that fail alone leave,
    and the others go on without them; where none fails alone, as when memory is short, they go on by halves.

    Args:
        model: The model.
        draws_at_once: Draws of all rows together that are held in memory; rows that may make more take turns.
    """

    def __init__(self, model: ChunkModel, draws_at_once: int = 4096) -> None:
        self._model, self._draws_at_once = model, draws_at_once
        self._rows: list[Row] = []
        self._cache = DynamicCache(config=model.config.backbone)
        self._mask_RC = torch.zeros(0, 0, dtype=torch.long, device=model.device)
        self._hidden_RD = torch.zeros(0, model.config.state_size, device=model.device)
        self._eos_ids = as_id_tensor(model.config.eos_token_id, model.device)
        self._pad = model.config.pad_token_id or 0

    def __len__(self) -> int:
        return len(self._rows)

    @torch.no_grad()
    def join(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        budget: int,
        seed: int,
        copy: int = 0,
    ) -> Row:
        """Read a prompt; the next step writes its first chunk.

        Args:
            prompt: Its tokens, at least one.
            sampler: How chunks are sampled.
            budget: Most new tokens, at least 1.
            seed: With the prompt and the copy it decides the text.
            copy: Which of several texts of the same prompt and seed, as of `num_return_sequences`.
        """
        chunks = Prompt.of(self._model, prompt)
        cache = DynamicCache(config=self._model.config.backbone)
        states_1CD = chunks.read(self._model, cache)
        generator = generator_of_row(seed, prompt, copy, self._model.device)
        row = Row(sampler, budget, generator, position=int(chunks.mask_BC.sum()))
        alone = ChunkBatch(self._model, self._draws_at_once)
        alone._rows, alone._cache, alone._mask_RC = [row], cache, chunks.mask_BC
        alone._hidden_RD = states_1CD[:, -1]
        self._append(alone)
        return row

    @torch.no_grad()
    def step(self) -> list[Written | Failed]:
        """Write a chunk of every row; those that ended or failed leave."""
        if not self._rows:
            return []
        try:
            return [*self._advance()]
        except Exception as error:
            if len(self._rows) == 1:
                [row] = self._rows
                self._select([])
                return [Failed(row, error)]
            logger.debug("a step of %d rows failed (%s)", len(self._rows), reason_of(error))
        failed = [one for row in self._rows if (one := self._try_alone(row)) is not None]
        if not failed:
            return self._step_by_halves()
        at_fault = {id(one.row) for one in failed}
        self._select([place for place, row in enumerate(self._rows) if id(row) not in at_fault])
        return [*failed, *self.step()]

    @torch.no_grad()
    def drop(self, row: Row) -> None:
        """Take a row out before its end; one that has left already is no matter."""
        if row in self._rows:
            self._select([place for place, other in enumerate(self._rows) if other is not row])

    def _advance(self) -> list[Written]:
        """A step that changes nothing if it fails."""
        before = _State(self)
        try:
            chunks_RK, written = self._sample()
            self._keep([place for place, row in enumerate(self._rows) if not row.has_ended], chunks_RK)
        except Exception:
            before.restore()
            raise
        return written

    def _try_alone(self, row: Row) -> Failed | None:
        """Whether a row fails by itself; nothing is written."""
        before = _State(self)
        try:
            self._select([self._rows.index(row)])
            self._advance()
        except Exception as error:
            return Failed(row, error)
        finally:
            before.restore()
        return None

    def _step_by_halves(self) -> list[Written | Failed]:
        number = len(self._rows)
        halves = [self._part(range(number // 2)), self._part(range(number // 2, number))]
        results = [one for half in halves for one in half.step()]
        self._select([])
        for half in halves:
            self._append(half)
        return results

    def _part(self, places: Sequence[int]) -> "ChunkBatch":
        """Some of the rows in a batch of their own, which are still in this one too."""
        before, part = _State(self), ChunkBatch(self._model, self._draws_at_once)
        try:
            self._select(list(places))
            part._rows, part._cache = self._rows, self._cache
            part._mask_RC, part._hidden_RD = self._mask_RC, self._hidden_RD
        finally:
            before.restore()
        return part

    def _append(self, other: "ChunkBatch") -> None:
        """Take the rows of another batch in; all at once, so that a failure leaves nothing behind."""
        if not len(other):
            return
        hidden_RD = torch.cat([self._hidden_RD.to(other._hidden_RD.dtype), other._hidden_RD])
        length = max(self._mask_RC.shape[1], other._mask_RC.shape[1])
        masks = (self._mask_RC, other._mask_RC)
        mask_RC = torch.cat([pad_columns(mask, (length - mask.shape[1], 0)) for mask in masks])
        cache = _side_by_side(self._cache, other._cache, self._model) if self._rows else other._cache
        self._hidden_RD, self._mask_RC, self._cache = hidden_RD, mask_RC, cache
        self._rows = [*self._rows, *other._rows]

    def _sample(self) -> tuple[Tensor, list[Written]]:
        """The next chunk of every row (R, K), by rows of equal samplers."""
        size = self._model.config.chunk_size
        chunks_RK = torch.full((len(self._rows), size), self._pad, device=self._model.device)
        written: list[Written | None] = [None] * len(self._rows)
        for sampler, places in self._turns():
            chosen = torch.tensor(places, device=self._model.device)
            generators = [self._rows[place].generator for place in places]
            hidden_AD = self._hidden_RD[chosen]
            if not bool(hidden_AD.isfinite().all()):  # Not every head would notice.
                raise ValueError("the state of the model is not finite; its weights may be damaged.")
            sample = self._model.sample_chunks(hidden_AD, sampler, generators)
            chunk_AK, ends_A = end_after_eos(sample.chunks_RK, self._eos_ids, self._pad)
            chunks_RK[chosen] = chunk_AK
            for number, place in enumerate(places):
                written[place] = self._note(
                    self._rows[place], chunk_AK[number], bool(ends_A[number]), sample, number
                )
        return chunks_RK, [one for one in written if one is not None]

    def _turns(self) -> Iterator[tuple[Sampler, list[int]]]:
        """Places of rows that are sampled together: by equal samplers, and not too many draws."""
        for sampler in dict.fromkeys(row.sampler for row in self._rows):
            places = [place for place, row in enumerate(self._rows) if row.sampler == sampler]
            most = max(1, self._draws_at_once // sampler.most_draws)
            yield from ((sampler, places[first : first + most]) for first in range(0, len(places), most))

    def _note(self, row: Row, chunk_K: Tensor, ends: bool, sample: ChunkSample, number: int) -> Written:
        """Count a chunk of a row, and tell what of it is text."""
        tokens = chunk_K.tolist()
        if ends:
            is_eos = torch.isin(chunk_K, self._eos_ids).tolist()
            tokens = tokens[: is_eos.index(True) + 1]
        by_eos = ends and len(tokens) <= row.budget
        tokens = tokens[: row.budget]
        row.budget -= len(tokens)
        row.has_ended = by_eos or row.budget == 0
        return Written(
            row,
            tokens,
            "eos" if by_eos else "budget" if row.has_ended else None,
            int(sample.num_draws_R[number]),
            float(sample.agreement_R[number]),
            bool(sample.fell_back_R[number]),
        )

    def _keep(self, places: list[int], chunks_RK: Tensor) -> None:
        """Let the other rows go, and read what was written for those that stay."""
        self._select(places)
        if not places:
            return
        self._mask_RC = pad_columns(self._mask_RC, (0, 1), value=1)
        position_R1 = torch.tensor([[row.position] for row in self._rows], device=self._model.device)
        kept_RK = chunks_RK[torch.tensor(places, device=chunks_RK.device)]
        states_R1D = read_chunks(self._model, kept_RK, self._mask_RC, position_R1, self._cache)
        self._hidden_RD = states_R1D[:, -1]
        for row in self._rows:
            row.position += 1

    def _select(self, places: list[int]) -> None:
        """Keep some rows, without columns that none of them needs."""
        if len(places) == len(self._rows):
            return
        chosen = torch.tensor(places, dtype=torch.long, device=self._model.device)
        mask_RC, hidden_RD = self._mask_RC[chosen], self._hidden_RD[chosen]
        first = int(mask_RC.any(0).int().argmax()) if places else mask_RC.shape[1]
        layers = [
            (keys[chosen, :, first:], values[chosen, :, first:]) for keys, values in _layers(self._cache)
        ]
        self._cache = _cache_of(layers if places else [], self._model)
        self._rows = [self._rows[place] for place in places]
        self._mask_RC, self._hidden_RD = mask_RC[:, first:], hidden_RD


class _State:
    """A batch as it is now, to go back to. Tensors are kept, not copied: a step makes new ones.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: ChunkBatch) -> None:
        self._batch = batch
        self._tensors = (batch._mask_RC, batch._hidden_RD)
        self._cache, self._layers = batch._cache, _layers(batch._cache)
        self._rows = list(batch._rows)
        self._numbers = [
            (row.budget, row.position, row.has_ended, row.generator.get_state()) for row in self._rows
        ]

    def restore(self) -> None:
        """Go back."""
        batch, batch._rows = self._batch, list(self._rows)
        batch._mask_RC, batch._hidden_RD = self._tensors
        batch._cache = self._cache
        cached: Any = self._cache.layers
        for layer, (keys, values) in zip(cached, self._layers, strict=True):
            layer.keys, layer.values = keys, values
        for row, (budget, position, has_ended, state) in zip(self._rows, self._numbers, strict=True):
            row.budget, row.position, row.has_ended = budget, position, has_ended
            row.generator.set_state(state)


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (R, heads, C, d) of each layer."""
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _cache_of(layers: list[tuple[Tensor, Tensor]], model: ChunkModel) -> DynamicCache:
    cache = DynamicCache(config=model.config.backbone)
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _side_by_side(first: DynamicCache, second: DynamicCache, model: ChunkModel) -> DynamicCache:
    """The rows of two caches in one, the shorter with padding in front (masked by whoever reads it)."""
    layers = []
    for pair in zip(_layers(first), _layers(second), strict=True):
        both = []
        for one, other in zip(*pair, strict=True):
            length = max(one.shape[2], other.shape[2])
            parts = [pad_columns(part, (0, 0, length - part.shape[2], 0)) for part in (one, other)]
            both.append(torch.cat(parts))
        layers.append((both[0], both[1]))
    return _cache_of(layers, model)
