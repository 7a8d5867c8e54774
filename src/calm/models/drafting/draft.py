"""Drafts of a CALM for a text, which may end inside a chunk.

Shapes: G drafted tokens, K tokens per chunk, C chunks, D state size, X size of what the head prepares, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calm.core.branches import Branches
from calm.core.samplers import HeadSampler, PoolSampler, Sampler
from calm.models.calm import CalmForCausalLM
from calm.models.context import longest_context
from calm.models.drafting.growing import GrowingTree, best_shape, line_shape
from calm.models.drafting.lookup import Lookup
from calm.models.generation.alternatives import ends_of, up_to_end
from calm.models.generation.reading import prefill
from calm.models.generation.sampling import prepare
from calm.models.generation.slots import SlotCache
from calm.models.generation.steps import SlotSteps
from calm.models.heads import TokenDistributions
from calm.models.heads.contract import MIN_TEMPERATURE

TREE_TOKENS = 8
"""More tokens of a larger tree are accepted, but reading it takes longer (docs/log.md)."""

_MAX_SINGLE_STEPS = 4  # Up to this many chunks are read one by one: a step costs less than a pass.


class Draft(NamedTuple):
    """Tokens that may come next.

    Args:
        branches: The tokens.
        distribution_at: Returns the distribution, (V,), from which the children of a node were drawn without
            replacement; None if the head does not know it, or was not used.
    """

    branches: Branches = Branches()
    distribution_at: Callable[[int], Tensor] | None = None


@dataclass
class _Reading:
    """What has been read of a text in one alignment: the cache, and the state after the last chunk."""

    cache: SlotCache
    state_1D: Tensor


class ChunkDrafter:
    """Drafts the continuation of one text.

    A CALM predicts whole chunks, but accepted text may end inside a chunk. So the text is read in up to K
    alignments, each with its own left padding, as the model has seen in training, and its own cache. An
    alignment is read further only when the text ends on one of its chunk boundaries.

    Args:
        model: The CALM.
        temperature: Sampling temperature. Any is valid; that of the target model is accepted most often.
        num_chunks: Chunks per draft.
        num_draws: Draws from which the most frequent chunk is taken, for heads that take no temperature; at
            temperature 1, a single draw is enough.
        lookup: Tokens at the end of the text that must have occurred before, for a draft to be copied from
            there (see `calm.models.drafting.lookup`); 0 copies nothing.
        tree_tokens: Tokens in the draft tree of the first chunk, for heads that know their probabilities; 0
            drafts a single path.
    """

    def __init__(
        self,
        model: CalmForCausalLM,
        temperature: float = 1.0,
        num_chunks: int = 1,
        num_draws: int = 16,
        lookup: int = 0,
        tree_tokens: int = TREE_TOKENS,
    ) -> None:
        self._model, self._num_chunks, self._tree_tokens = model, num_chunks, tree_tokens
        self._steps = SlotSteps(model)
        self._sampler = _sampler_for(model, temperature, num_draws)
        self._readings: dict[int, _Reading] = {}
        self._lookup = Lookup(lookup)
        self._ends, self._max_context = frozenset(ends_of(model.config)), longest_context(model.config)

    @property
    def _has_distributions(self) -> bool:
        """Whether drafts come with the distributions that they were drawn from."""
        is_drawn = isinstance(self._sampler, HeadSampler) and self._sampler.temperature >= MIN_TEMPERATURE
        return is_drawn and isinstance(self._model.head, TokenDistributions)

    @torch.no_grad()
    def draft(
        self,
        text: Sequence[int],
        max_length: int,
        generator: torch.Generator | None = None,
        allow_tree: bool = False,
    ) -> Draft:
        """Draft what may come next; empty if the CALM's context is full.

        Args:
            text: All tokens so far; between calls, tokens may only be appended.
            max_length: Maximum length of a path.
            generator: Source of randomness, on the model's device.
            allow_tree: Whether the draft may have branches.
        """
        if max_length > 0 and (copied := self._lookup.draft(text, max_length)):
            return Draft(Branches.line(copied))
        size = self._model.config.chunk_size
        num_chunks = min(self._num_chunks, -(-max_length // size))
        if max_length < 1 or not self._has_room(text, num_chunks):
            return Draft()
        reading = self._read(text)
        # Drafted chunks are written to the cache after the text, where later text overwrites them.
        state_1D, cache = reading.state_1D, reading.cache.shared()
        if not isinstance(self._model.head, TokenDistributions):
            tokens = self._sample_line(state_1D, cache, num_chunks, generator)
            return Draft(Branches.line(tokens[:max_length]))
        line = line_shape(size)
        shape = best_shape(self._tree_tokens, size) if allow_tree and self._tree_tokens else line
        if num_chunks > 1:
            shape = {**line, **shape}  # The next chunk needs a complete one before it.
        tree = GrowingTree(self._model.head, self._sampler.temperature, self._ends, generator)
        for index in range(num_chunks):
            prepared_1X = prepare(self._model, state_1D, self._steps.compiled)
            chunk_K = tree.add_chunk(prepared_1X, size, shape, max_length - index * size)
            if chunk_K is None or index + 1 == num_chunks:
                break
            state_1D, shape = self._steps.advance(chunk_K.unsqueeze(0), cache), line
        return Draft(tree.branches, tree.distribution_at if self._has_distributions else None)

    @torch.no_grad()
    def read_ahead(self, text: Sequence[int], max_tokens: int) -> bool:
        """Read a piece of a text if it is long; returns whether the rest is short enough for a draft.

        Args:
            text: All tokens so far.
            max_tokens: Tokens per piece.
        """
        if not self._has_room(text, 1):
            return True  # Nothing will be drafted.
        size, reading = self._model.config.chunk_size, self._reading_for(text)
        num_read = 0 if reading is None else reading.cache.lengths[0]
        chunks_per_piece = max(1, max_tokens // size)
        if -(-len(text) // size) - num_read <= chunks_per_piece:
            return True
        self._read_piece(text, reading, self._unread_chunks(text, reading)[:chunks_per_piece])
        return False

    def _has_room(self, text: Sequence[int], num_chunks: int) -> bool:
        """Whether this many chunks can be drafted after a text; the last of them is not read."""
        size = self._model.config.chunk_size
        padded_length = -(-len(text) // size) * size
        return self._max_context is None or padded_length + size * (num_chunks - 1) <= self._max_context

    def _sample_line(
        self, state_1D: Tensor, cache: SlotCache, num_chunks: int, generator: torch.Generator | None
    ) -> list[int]:
        """The next chunks as the sampler draws them, up to an end-of-text token."""
        tokens: list[int] = []
        while True:
            sample = self._model.sample_chunks(state_1D, self._sampler, generator, self._steps.compiled)
            tokens += up_to_end(sample.chunks_RK[0].tolist(), self._ends)
            num_chunks -= 1
            if num_chunks == 0 or tokens[-1] in self._ends:
                return tokens
            state_1D = self._steps.advance(sample.chunks_RK, cache)

    def _read(self, text: Sequence[int]) -> _Reading:
        """Read the rest of the text, in the alignment in which it ends on a chunk boundary."""
        reading = self._reading_for(text)
        unread_CK = self._unread_chunks(text, reading)
        if reading is not None and len(unread_CK) <= _MAX_SINGLE_STEPS:
            for chunk_K in unread_CK:
                reading.state_1D = self._steps.advance(chunk_K.unsqueeze(0), reading.cache)
            return reading
        return self._read_piece(text, reading, unread_CK)

    def _read_piece(self, text: Sequence[int], reading: _Reading | None, piece_CK: Tensor) -> _Reading:
        """Read the next chunks in one pass."""
        cache = None if reading is None else reading.cache
        state_1D, cache = prefill(self._model, [piece_CK], [cache])
        reading = self._readings[-len(text) % self._model.config.chunk_size] = _Reading(cache, state_1D)
        return reading

    def _reading_for(self, text: Sequence[int]) -> _Reading | None:
        """What has been read in the alignment in which the text ends on a chunk boundary."""
        return self._readings.get(-len(text) % self._model.config.chunk_size)

    def _unread_chunks(self, text: Sequence[int], reading: _Reading | None) -> Tensor:
        """The chunks (C, K) still to be read in an alignment."""
        config = self._model.config
        size, pad = config.chunk_size, config.pad_token_id or 0
        padding = -len(text) % size
        # Only unread tokens are copied, so a round costs the same however long the text is.
        if reading is None:
            tokens = [pad] * padding + list(text)
        else:
            tokens = list(text[reading.cache.lengths[0] * size - padding :])
        chunks_CK = torch.tensor(tokens, dtype=torch.long, device=self._model.device).unflatten(0, (-1, size))
        # The target model may generate tokens outside the CALM's vocabulary.
        return chunks_CK.masked_fill(chunks_CK >= config.vocab_size, pad)


def _sampler_for(model: CalmForCausalLM, temperature: float, num_draws: int) -> Sampler:
    """The head's own sampler, or if it takes no temperature, the most frequent chunk of several draws."""
    lowest, temperature = model.head.config.lowest_temperature, min(temperature, 1.0)
    if lowest < 1:
        is_greedy = temperature < MIN_TEMPERATURE and lowest == 0
        return HeadSampler(temperature=0.0 if is_greedy else max(temperature, lowest))
    if temperature == 1:
        return PoolSampler(num_draws=1)
    return PoolSampler(temperature=temperature if temperature * num_draws >= 1 else 0.0, num_draws=num_draws)
