"""Rows that are written together, join and leave at any chunk, and know nothing of each other.

Shapes: R rows, C chunks in the cache, K tokens per chunk, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_columns
from transformers.cache_utils import DynamicCache

from calm.core.chunks import align_to_chunks, as_id_tensor, end_after_eos
from calm.core.random import generators_of_rows
from calm.core.temperature import ChunkSample, TemperatureSettings
from calm.models.calm import CalmForCausalLM


@dataclass(eq=False)
class Row:
    """A text that is being written.

    Args:
        settings: How its chunks are sampled.
        budget: Tokens that may still be written.
        generator: Source of its randomness.
        position: Position of its next chunk.
        has_ended: Whether it has left.
    """

    settings: TemperatureSettings
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


class ChunkBatch:
    """Writes all its rows one chunk further at each step.

    A prompt is read when its row joins, alone, with a cache of its own; then the caches are put together with
    padding in front. With the same seed a row gets the text that `generate` gives its prompt alone, but for
    rounding, which differs between the shapes of a batch.

    Args:
        model: The model.
    """

    def __init__(self, model: CalmForCausalLM) -> None:
        self._model = model
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
        settings: TemperatureSettings,
        budget: int,
        seed: int,
        copy: int = 0,
    ) -> Row:
        """Read a prompt; the next step writes its first chunk.

        Args:
            prompt: Its tokens, at least one.
            settings: How chunks are sampled.
            budget: Most new tokens, at least 1.
            seed: With the prompt and the copy it decides the text.
            copy: Which of several texts of the same prompt and seed, as of `num_return_sequences`.
        """
        device, size = self._model.device, self._model.config.chunk_size
        ids_1T = torch.tensor([list(prompt)], device=device)
        tokens_1T, mask_1C = align_to_chunks(ids_1T, torch.ones_like(ids_1T), size, self._pad)
        cache = DynamicCache(config=self._model.config.backbone)
        outputs = self._model(
            tokens_1T,
            attention_mask=mask_1C.repeat_interleave(size, dim=1),
            position_ids=(mask_1C.cumsum(-1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
        )
        generator = generators_of_rows(seed, [prompt] * (copy + 1), device)[copy]
        row = Row(settings, budget, generator, position=int(mask_1C.sum()))
        hidden_1D = outputs.last_hidden_state[:, -1]
        hidden_RD = torch.cat([self._hidden_RD.to(hidden_1D.dtype), hidden_1D])
        length = max(self._mask_RC.shape[1], mask_1C.shape[1])
        parts = [pad_columns(mask, (length - mask.shape[1], 0)) for mask in (self._mask_RC, mask_1C)]
        mask_RC = torch.cat(parts)
        cache = _side_by_side(self._cache, cache, self._model) if self._rows else cache
        # All at once: a row that failed to join must leave nothing behind.
        self._hidden_RD, self._mask_RC, self._cache = hidden_RD, mask_RC, cache
        self._rows.append(row)
        return row

    @torch.no_grad()
    def step(self) -> list[Written]:
        """Write a chunk of every row; those that ended leave."""
        if not self._rows:
            return []
        chunks_RK, written = self._sample()
        self._keep([place for place, row in enumerate(self._rows) if not row.has_ended], chunks_RK)
        return written

    @torch.no_grad()
    def drop(self, row: Row) -> None:
        """Take a row out before its end; one that has left already is no matter."""
        if row in self._rows:
            self._select([place for place, other in enumerate(self._rows) if other is not row])

    def _sample(self) -> tuple[Tensor, list[Written]]:
        """The next chunk of every row (R, K), by rows of equal settings."""
        size = self._model.config.chunk_size
        chunks_RK = torch.full((len(self._rows), size), self._pad, device=self._model.device)
        written: list[Written | None] = [None] * len(self._rows)
        for settings in dict.fromkeys(row.settings for row in self._rows):
            places = [place for place, row in enumerate(self._rows) if row.settings == settings]
            chosen = torch.tensor(places, device=self._model.device)
            generators = [self._rows[place].generator for place in places]
            sample = self._model.sample_chunks(self._hidden_RD[chosen], settings, generators)
            chunk_AK, ends_A = end_after_eos(sample.chunks_RK, self._eos_ids, self._pad)
            chunks_RK[chosen] = chunk_AK
            for number, place in enumerate(places):
                written[place] = self._note(
                    self._rows[place], chunk_AK[number], bool(ends_A[number]), sample, number
                )
        return chunks_RK, [one for one in written if one is not None]

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
        size = self._model.config.chunk_size
        self._mask_RC = pad_columns(self._mask_RC, (0, 1), value=1)
        positions = torch.tensor([[row.position] for row in self._rows], device=self._model.device)
        outputs = self._model(
            chunks_RK[torch.tensor(places, device=chunks_RK.device)],
            attention_mask=self._mask_RC.repeat_interleave(size, dim=1),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._hidden_RD = outputs.last_hidden_state[:, -1]
        for row in self._rows:
            row.position += 1

    def _select(self, places: list[int]) -> None:
        """Keep some rows, without columns that none of them needs."""
        if len(places) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in places]
        chosen = torch.tensor(places, dtype=torch.long, device=self._model.device)
        mask_RC = self._mask_RC[chosen]
        first = int(mask_RC.any(0).int().argmax()) if places else mask_RC.shape[1]
        self._mask_RC, self._hidden_RD = mask_RC[:, first:], self._hidden_RD[chosen]
        layers = [
            (keys[chosen, :, first:], values[chosen, :, first:]) for keys, values in _layers(self._cache)
        ]
        self._cache = _cache_of(layers if places else [], self._model)


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (R, heads, C, d) of each layer."""
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _cache_of(layers: list[tuple[Tensor, Tensor]], model: CalmForCausalLM) -> DynamicCache:
    cache = DynamicCache(config=model.config.backbone)
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _side_by_side(first: DynamicCache, second: DynamicCache, model: CalmForCausalLM) -> DynamicCache:
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
