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
from calm.progress import tracked

_NOTHING = -1  # A history token before the start of the document.


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
        where = torch.arange(len(stream))  # Positions with enough history for it.
        self.levels = [_make_level(context[:1], context, stream, vocab_size)]
        for length in tracked(range(1, order), f"counting {order}-grams", "length"):
            keep = history[where] >= length
            where, context = where[keep], context[keep]
            key = context * vocab_size + stream[where - length]
            unique, context = torch.unique(key, return_inverse=True)
            if not len(unique):
                break  # No document is that long.
            self.levels.append(_make_level(unique, context, stream[where], vocab_size))

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
        for level, (ids, known) in zip(self._levels, self._descend(history_PH), strict=True):
            uniform = torch.rand((2, *shape), generator=generator, dtype=torch.float64)
            first, count = level.start[ids], level.start[ids + 1] - level.start[ids]
            pick = level.next_token[first + (uniform[0] * count).long()]
            # A trusted longer context overrides the shorter ones.
            token = torch.where(known & (uniform[1] < level.trust[ids]), pick, token)
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
        found_P = torch.full(token_P.shape, 1 / self.vocab_size, dtype=torch.float64)
        pairs = self._counts.pairs_of_levels[: self.order]
        for level, pair, (ids, known) in zip(self._levels, pairs, self._descend(history_PH), strict=True):
            key = ids * self.vocab_size + token_P
            seen = torch.searchsorted(pair, key, right=True) - torch.searchsorted(pair, key)
            share = seen.double() / (level.start[ids + 1] - level.start[ids])
            trust = torch.where(known, level.trust[ids].double(), 0.0)
            found_P = trust * share + (1 - trust) * found_P
        return found_P

    def log_probability(self, tokens: list[int], first: int = 0) -> float:
        """Log-probability of a document's tokens from position `first` on, given those before it.

        Args:
            tokens: Token ids from the start of the document.
            first: Position of the first token to score.
        """
        length = self.order - 1
        ids = torch.tensor([_NOTHING] * length + tokens, dtype=torch.long)
        history_P = [ids[place : place + length] for place in range(first, len(tokens))]
        if not history_P:
            return 0.0
        return float(self.probability(torch.stack(history_P), ids[length + first :]).log().sum())

    def _descend(self, history_PH: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, from the shortest context to the longest, its id per history and whether it was seen."""
        ids = torch.zeros(len(history_PH), dtype=torch.long)
        known = torch.ones(len(history_PH), dtype=torch.bool)
        for length, level in enumerate(self._levels):
            if length > 0:
                further = history_PH[:, -length]
                key = ids * self.vocab_size + further
                ids = torch.searchsorted(level.key, key).clamp_max(len(level.key) - 1)
                known = known & (further != _NOTHING) & (level.key[ids] == key)
            yield ids, known

    def _histories(self, batch: Batch) -> Tensor:
        """The n - 1 tokens before each of chunks 1..C-1, (B, C-1, H)."""
        length = self.order - 1
        tokens = torch.where(batch["labels"] == IGNORED_LABEL, _NOTHING, batch["input_ids"])
        tokens_BCK = split_into_chunks(tokens, self.chunk_size)
        reach = -(-length // self.chunk_size)  # Chunks that the history spans.
        pieces = []
        for back in range(reach, 0, -1):
            earlier = torch.roll(tokens_BCK, back, dims=1)
            # The position in the document says how far back it extends.
            inside = batch["position_ids"] >= back
            pieces.append(torch.where(inside.unsqueeze(-1), earlier, _NOTHING))
        history = torch.cat(pieces, dim=-1) if pieces else tokens_BCK[..., :0]
        return history[:, 1:, history.shape[-1] - length :]


def _make_level(key: Tensor, context: Tensor, next_token: Tensor, vocab_size: int) -> _Level:
    num_contexts = len(key)
    count = torch.bincount(context, minlength=num_contexts)
    distinct = torch.unique(context * vocab_size + next_token) // vocab_size
    num_distinct = torch.bincount(distinct, minlength=num_contexts)
    return _Level(
        key=key,
        start=torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)]),
        next_token=next_token[torch.argsort(context, stable=True)],
        trust=count / (count + num_distinct),
    )
