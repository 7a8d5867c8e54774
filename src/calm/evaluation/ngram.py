"""The n-gram floor: a smoothed n-gram model, scored like any other sampler.

Smoothing is Witten-Bell interpolation: a context seen N times before D distinct tokens is trusted with
probability N / (N + D); otherwise the next shorter context decides, and finally the uniform distribution.
Sampling needs no probabilities: pick one of the N occurrences of the trusted context at random.
Probabilities are only computed for the cross-entropy.

Shapes: P positions, H tokens of history, K tokens per chunk, N draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from calm.core.chunks import IGNORED_LABEL, split_into_chunks
from calm.evaluation.processes import Batch
from calm.progress import track

_NO_TOKEN = -1  # In a history, before the start of the document.


@dataclass(frozen=True)
class _Level:
    """All contexts of one length; context i has occurrences start[i] .. start[i+1] - 1.

    key: (id of the context without its first token, first token) packed into one number, sorted.
    """

    key: Tensor
    start: Tensor
    next_token: Tensor
    trust: Tensor


class NGramCounts:
    """The n-grams of a text, up to some order.

    Args:
        stream: Token ids of the documents, one after another, with EOS after each.
        lengths: Length of each document, EOS included.
        order: The longest n.
        vocab_size: Number of token ids.
    """

    def __init__(self, stream: Tensor, lengths: Tensor, *, order: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        history = torch.arange(len(stream)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        context = torch.zeros_like(stream)  # Context ids at the current level.
        position = torch.arange(len(stream))  # Positions with enough history for it.
        self.levels = [_make_level(context[:1], context, stream, vocab_size)]
        for length in track(range(1, order), f"counting {order}-grams", "length"):
            is_long_enough = history[position] >= length
            position, context = position[is_long_enough], context[is_long_enough]
            key = context * vocab_size + stream[position - length]
            unique, context = torch.unique(key, return_inverse=True)
            if not len(unique):
                break  # No document is that long.
            self.levels.append(_make_level(unique, context, stream[position], vocab_size))

    @cached_property
    def pairs_of_levels(self) -> list[Tensor]:
        """For each level, the occurrences as (context id, next token) packed into one number, sorted."""
        pairs = []
        for level in self.levels:
            context = torch.repeat_interleave(torch.arange(len(level.trust)), level.start.diff())
            pairs.append((context * self.vocab_size + level.next_token).sort().values)
        return pairs


class NGramSampler:
    """An n-gram model that samples chunks, and computes the cross-entropy of given ones.

    Args:
        counts: The n-grams of the training text, up to this order or a higher one.
        order: n; a token depends on the n - 1 before it.
        eos_token_id: Id that ends each document.
        pad_token_id: Padding after EOS in a chunk.
        chunk_size: Tokens per chunk K.
    """

    def __init__(
        self, counts: NGramCounts, *, order: int, eos_token_id: int, pad_token_id: int, chunk_size: int
    ) -> None:
        self.order, self.vocab_size, self.chunk_size = order, counts.vocab_size, chunk_size
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self._counts, self._levels = counts, counts.levels[:order]

    def draw_next_chunks(
        self, batch: Batch, is_target_BC: Tensor, num_draws: int, generator: torch.Generator
    ) -> Tensor:
        """See `calm.evaluation.brier.ChunkSampler`."""
        history_PH = self._histories(batch)[is_target_BC]
        history = history_PH.repeat(num_draws, 1)
        chunk: list[Tensor] = []
        ended = torch.zeros(len(history), dtype=torch.bool)
        for _ in range(self.chunk_size):
            token = torch.where(ended, self.pad_token_id, self.draw_tokens(history, generator))
            ended = ended | (token == self.eos_token_id)
            chunk.append(token)
            history = torch.cat([history, token.unsqueeze(-1)], dim=1)[:, 1:]
        return torch.stack(chunk, dim=-1).unflatten(0, (num_draws, -1))

    def draw_tokens(self, history_PH: Tensor, generator: torch.Generator) -> Tensor:
        """Sample a next token for each history (H = n - 1, `-1` before the start of a document), (P,)."""
        shape = history_PH.shape[:1]
        token = torch.randint(self.vocab_size, shape, generator=generator)  # The uniform distribution.
        for level, (ids, seen) in zip(self._levels, self._descend(history_PH), strict=True):
            uniform = torch.rand((2, *shape), generator=generator, dtype=torch.float64)
            first, count = level.start[ids], level.start[ids + 1] - level.start[ids]
            next_token = level.next_token[first + (uniform[0] * count).long()]
            # A trusted longer context overrides the shorter ones.
            token = torch.where(seen & (uniform[1] < level.trust[ids]), next_token, token)
        return token

    def losses(self, batch: Batch, is_target_BC: Tensor, chunks_PK: Tensor) -> Tensor:
        """Cross-entropy of each token of the target chunks given those before it, in nats, (P, K)."""
        history_PH = self._histories(batch)[is_target_BC]
        losses = []
        for token_P in chunks_PK.unbind(-1):
            losses.append(-self.probability(history_PH, token_P).log())
            history_PH = torch.cat([history_PH, token_P.unsqueeze(-1)], dim=1)[:, 1:]
        return torch.stack(losses, dim=-1)

    def probability(self, history_PH: Tensor, token_P: Tensor) -> Tensor:
        """Probability of a given token after each history (see `draw_tokens`), float64, (P,)."""
        p_P = torch.full(token_P.shape, 1 / self.vocab_size, dtype=torch.float64)
        pairs = self._counts.pairs_of_levels[: self.order]
        for level, pair, (ids, seen) in zip(self._levels, pairs, self._descend(history_PH), strict=True):
            key = ids * self.vocab_size + token_P
            count = torch.searchsorted(pair, key, right=True) - torch.searchsorted(pair, key)
            share = count.double() / (level.start[ids + 1] - level.start[ids])
            trust = torch.where(seen, level.trust[ids].double(), 0.0)
            p_P = trust * share + (1 - trust) * p_P
        return p_P

    def log_probability(self, tokens: list[int], first: int = 0) -> float:
        """Log-probability of a document's tokens from position `first` on, given those before it.

        Args:
            tokens: Token ids from the start of the document.
            first: Position of the first token to score.
        """
        if first >= len(tokens):
            return 0.0
        length = self.order - 1
        ids = torch.tensor([_NO_TOKEN] * length + tokens, dtype=torch.long)
        histories = [ids[position : position + length] for position in range(first, len(tokens))]
        return float(self.probability(torch.stack(histories), ids[length + first :]).log().sum())

    def _descend(self, history_PH: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, from the shortest context to the longest, its id per history and whether it was seen."""
        ids = torch.zeros(len(history_PH), dtype=torch.long)
        seen = torch.ones(len(history_PH), dtype=torch.bool)
        for length, level in enumerate(self._levels):
            if length > 0:
                token = history_PH[:, -length]
                key = ids * self.vocab_size + token
                ids = torch.searchsorted(level.key, key).clamp_max(len(level.key) - 1)
                seen = seen & (token != _NO_TOKEN) & (level.key[ids] == key)
            yield ids, seen

    def _histories(self, batch: Batch) -> Tensor:
        """The n - 1 tokens before each of chunks 1..C-1, (B, C-1, H)."""
        length = self.order - 1
        tokens = torch.where(batch["labels"] == IGNORED_LABEL, _NO_TOKEN, batch["input_ids"])
        tokens_BCK = split_into_chunks(tokens, self.chunk_size)
        num_chunks = -(-length // self.chunk_size)  # That the history spans.
        chunks = []
        for distance in range(num_chunks, 0, -1):
            earlier_BCK = torch.roll(tokens_BCK, distance, dims=1)
            is_same_document_BC = batch["position_ids"] >= distance
            chunks.append(torch.where(is_same_document_BC.unsqueeze(-1), earlier_BCK, _NO_TOKEN))
        history = torch.cat(chunks, dim=-1) if chunks else tokens_BCK[..., :0]
        return history[:, 1:, history.shape[-1] - length :]


def _make_level(key: Tensor, context: Tensor, next_token: Tensor, vocab_size: int) -> _Level:
    num_contexts = len(key)
    count = torch.bincount(context, minlength=num_contexts)
    context_of_pair = torch.unique(context * vocab_size + next_token) // vocab_size
    num_distinct = torch.bincount(context_of_pair, minlength=num_contexts)
    return _Level(
        key=key,
        start=torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)]),
        next_token=next_token[torch.argsort(context, stable=True)],
        trust=count / (count + num_distinct),
    )
