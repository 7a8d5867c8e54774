"""What a CALM drafts behind a text, which ends anywhere.

Shapes: G drafted tokens, K tokens per chunk, C chunks, D state size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calm.core.samplers import HeadSampler, PoolSampler, Sampler
from calm.models.calm import CalmForCausalLM
from calm.models.context import longest_context
from calm.models.drafting.lookup import Lookup
from calm.models.heads import Likelihood, TokenDistributions
from calm.models.heads.contract import MIN_TEMPERATURE
from calm.models.writing.alternatives import ends_of, up_to_end
from calm.models.writing.reading import read_on
from calm.models.writing.slots import SlotCache
from calm.models.writing.steps import SlotSteps

_FEW = 4  # So many chunks are read one after the other: a step costs less than a pass.


class Draft(NamedTuple):
    """Tokens that may come next.

    Args:
        tokens_G: The tokens.
        drafted_G: Probability of each given those before it; None if the head cannot tell, or had no say.
        distribution: Gives the whole distribution, (V,), of one place; None likewise.
    """

    tokens_G: Sequence[int]
    drafted_G: Tensor | None = None
    distribution: Callable[[int], Tensor] | None = None


@dataclass
class _Reading:
    """What has been read of a text in one alignment."""

    cache: SlotCache
    state_1D: Tensor


class ChunkDrafter:
    """Drafts what comes next in one text.

    A CALM predicts whole chunks, and the text that is kept of a draft ends anywhere. So the text is read in
    up to K alignments, each with padding of its own in front, as the model has seen it in training. Each has
    its own cache, and is read on only when the text ends with one of its chunks.

    Args:
        model: The CALM.
        temperature: Of its draws. Any is right; that of the model that decides agrees with it most often.
        num_chunks: Chunks of a draft.
        num_draws: Draws that the most frequent chunk is taken from, for heads that take no temperature; at 1
            a single one does.
        lookup: Tokens at the end of the text that must have stood in it before, for a draft to be copied from
            there (see `calm.models.drafting.lookup`); 0 copies nothing.
    """

    def __init__(
        self,
        model: CalmForCausalLM,
        temperature: float = 1.0,
        num_chunks: int = 1,
        num_draws: int = 16,
        lookup: int = 0,
    ) -> None:
        self._model, self._num_chunks = model, num_chunks
        self._steps = SlotSteps(model)
        self._sampler = _sampler_for(model, temperature, num_draws)
        self._readings: dict[int, _Reading] = {}
        self._lookup = Lookup(lookup)
        self._ends, self._longest = frozenset(ends_of(model.config)), longest_context(model.config)

    @property
    def tells_probabilities(self) -> bool:
        """Whether drafts come with their probabilities."""
        head = self._model.head
        is_drawn = isinstance(self._sampler, HeadSampler) and self._sampler.temperature >= MIN_TEMPERATURE
        return is_drawn and isinstance(head, Likelihood) and isinstance(head, TokenDistributions)

    @torch.no_grad()
    def draft(self, text: Sequence[int], most: int, generator: torch.Generator | None = None) -> Draft:
        """What may come next; nothing where the draft's context is full.

        Args:
            text: All tokens so far. Of a text that was seen before, all but the tokens behind its end stay.
            most: Tokens of the draft, at most.
            generator: Source of randomness, on the model's device.
        """
        if most > 0 and (copied := self._lookup.draft(text, most)):
            return Draft(copied)
        size = self._model.config.chunk_size
        num_chunks = min(self._num_chunks, -(-most // size))
        if most < 1 or not self._has_room(text, num_chunks):
            return Draft(())
        reading = self._read(text)
        # What is drafted is written behind the text, where the next text overwrites it.
        state_1D, cache = reading.state_1D, reading.cache.shared()
        states, chunks = [], []
        while True:
            sample = self._model.sample_chunks(state_1D, self._sampler, generator, self._steps.compiled)
            states.append(state_1D)
            chunks.append(sample.chunks_RK)
            if len(chunks) == num_chunks or not self._ends.isdisjoint(sample.chunks_RK[0].tolist()):
                break
            state_1D = self._steps.advance(sample.chunks_RK, cache)
        states_CD, chunks_CK = torch.cat(states), torch.cat(chunks)
        tokens_G = up_to_end(chunks_CK.flatten().tolist(), self._ends)[:most]
        if not self.tells_probabilities:
            return Draft(tokens_G)
        return self._with_probabilities(tokens_G, states_CD, chunks_CK)

    @torch.no_grad()
    def read_ahead(self, text: Sequence[int], most: int) -> bool:
        """Read a piece of a text if it is long; whether the rest is short enough for a draft.

        Args:
            text: All tokens so far.
            most: Tokens of a piece.
        """
        if not self._has_room(text, 1):
            return True  # Nothing will be drafted.
        reading, left_CK = self._unread(text)
        num_chunks = max(1, most // self._model.config.chunk_size)
        if len(left_CK) <= num_chunks:
            return True
        self._read_piece(text, reading, left_CK[:num_chunks])
        return False

    def _has_room(self, text: Sequence[int], num_chunks: int) -> bool:
        """Whether so many chunks can be drafted behind a text; the last of them is not read."""
        size = self._model.config.chunk_size
        whole = -(-len(text) // size) * size
        return self._longest is None or whole + size * (num_chunks - 1) <= self._longest

    def _with_probabilities(self, tokens_G: Sequence[int], states_CD: Tensor, chunks_CK: Tensor) -> Draft:
        head, size, temperature = self._model.head, chunks_CK.shape[1], self._sampler.temperature
        assert isinstance(head, Likelihood)
        of_token_CK = head.token_probabilities(states_CD, chunks_CK, temperature).of_token_PK

        def distribution(place: int) -> Tensor:
            assert isinstance(head, TokenDistributions)
            chunk, within = divmod(place, size)
            part = slice(chunk, chunk + 1)
            with torch.no_grad():
                return head.token_distribution(states_CD[part], chunks_CK[part], within, temperature)[0]

        return Draft(tokens_G, of_token_CK.flatten()[: len(tokens_G)], distribution)

    def _read(self, text: Sequence[int]) -> _Reading:
        """Read on in the alignment in which the text ends with a chunk."""
        reading, left_CK = self._unread(text)
        if reading is not None and len(left_CK) <= _FEW:
            for chunk_K in left_CK:
                reading.state_1D = self._steps.advance(chunk_K.unsqueeze(0), reading.cache)
            return reading
        return self._read_piece(text, reading, left_CK)

    def _read_piece(self, text: Sequence[int], reading: _Reading | None, piece_CK: Tensor) -> _Reading:
        """Read chunks on in one pass."""
        cache = None if reading is None else reading.cache
        state_1D, cache = read_on(self._model, [piece_CK], [cache])
        reading = self._readings[-len(text) % self._model.config.chunk_size] = _Reading(cache, state_1D)
        return reading

    def _unread(self, text: Sequence[int]) -> tuple[_Reading | None, Tensor]:
        """What has been read in the alignment in which the text ends with a chunk, and the chunks left."""
        config, device = self._model.config, self._model.device
        size, pad = config.chunk_size, config.pad_token_id or 0
        padding = -len(text) % size
        reading = self._readings.get(padding)
        num_read = 0 if reading is None else reading.cache.lengths[0]
        # Only what is left is copied: a round costs the same however long the text is.
        left = [pad] * padding + list(text) if num_read == 0 else text[num_read * size - padding :]
        left_CK = torch.tensor(left, dtype=torch.long, device=device).unflatten(0, (-1, size))
        # The model that decides may write tokens that the draft does not have.
        return reading, left_CK.masked_fill(left_CK >= config.vocab_size, pad)


def _sampler_for(model: CalmForCausalLM, temperature: float, num_draws: int) -> Sampler:
    """As the head draws, or where it takes no temperature, the most frequent chunk of some draws."""
    lowest, temperature = model.head.config.lowest_temperature, min(temperature, 1.0)
    if lowest < 1:
        is_likeliest = temperature < MIN_TEMPERATURE and lowest == 0
        return HeadSampler(temperature=0.0 if is_likeliest else max(temperature, lowest))
    if temperature == 1:
        return PoolSampler(num_draws=1)
    return PoolSampler(temperature=temperature if temperature * num_draws >= 1 else 0.0, num_draws=num_draws)
