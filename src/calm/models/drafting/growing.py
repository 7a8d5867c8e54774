"""A draft tree, as it grows token by token.

Shapes: M nodes with candidates, C candidates, K tokens per chunk, D state size, V vocabulary.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from calm.core.branches import TEXT, Branches
from calm.core.speculative import draw_distinct
from calm.models.heads import TokenDistributions
from calm.models.heads.contract import MIN_TEMPERATURE, require_finite

Way = tuple[int, ...]
"""A path from the start of a chunk to a node in it: which of the candidates each token is, from 0."""

# How often the first, second, ... candidate at a node is the accepted one (docs/log.md).
_KEPT = (0.42, 0.11, 0.06, 0.04, 0.025, 0.02, 0.015, 0.01)


def line_shape(depth: int) -> dict[Way, int]:
    """One candidate per node: a single path."""
    return {(0,) * number: 1 for number in range(depth)}


@cache
def best_shape(number: int, depth: int) -> Mapping[Way, int]:
    """The tree with the most accepted tokens at the measured rates, as a number of candidates per node.

    A path is accepted with the product of its tokens' rates, and the best tree consists of the paths with the
    highest products (Chen et al., arXiv 2402.12374).

    Args:
        number: Tokens in total.
        depth: Maximum length of a path.
    """
    shape: dict[Way, int] = {}
    ways: list[tuple[float, Way]] = [(-_KEPT[0], (0,))]
    while ways and sum(shape.values()) < number:
        kept, (*before, last) = heapq.heappop(ways)
        shape[tuple(before)] = last + 1
        if last + 1 < len(_KEPT):
            heapq.heappush(ways, (kept / _KEPT[last] * _KEPT[last + 1], (*before, last + 1)))
        if len(before) + 1 < depth:
            heapq.heappush(ways, (kept * _KEPT[0], (*before, last, 0)))
    return shape


class _Tip(NamedTuple):
    """A node where the draft may continue, and the tokens of its chunk so far."""

    place: int
    tokens: Sequence[int]


class Growing:
    """A growing draft tree.

    Args:
        head: Provides the distributions.
        temperature: Sampling temperature; below 0.01 the candidates are the likeliest tokens.
        ends: Tokens that end a path.
        generator: Source of randomness.
    """

    def __init__(
        self,
        head: TokenDistributions,
        temperature: float,
        ends: Collection[int],
        generator: torch.Generator | None,
    ) -> None:
        self._head, self._temperature = head, temperature
        self._ends, self._generator = ends, generator
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._distributions: dict[int, Tensor] = {}
        self._last = TEXT

    @property
    def branches(self) -> Branches:
        """The tree so far."""
        return Branches(self._tokens, self._parents)

    def distribution_at(self, place: int) -> Tensor:
        """The distribution, (V,), from which the children of a node were drawn."""
        return self._distributions[place]

    def add_chunk(self, state_1D: Tensor, size: int, shape: Mapping[Way, int], most: int) -> Tensor | None:
        """Grow a chunk after the first candidates of the previous one.

        Args:
            state_1D: State of the previous chunk.
            size: Tokens per chunk K.
            shape: Number of candidates at each node.
            most: Maximum length of a path.

        Returns:
            Its first candidates, (K,), if they form a chunk that another may follow.
        """
        level: dict[Way, _Tip] = {(): _Tip(self._last, ())}
        for _ in range(min(size, most)):
            level = {way: tip for way, tip in level.items() if way in shape and not self._has_ended(tip)}
            if not level:
                return None
            tips = list(level.values())
            of_tips_MV = self._distributions_of(state_1D, [tip.tokens for tip in tips], size)
            self._distributions |= {tip.place: own_V for tip, own_V in zip(tips, of_tips_MV, strict=True)}
            drawn = self._candidates(of_tips_MV, max(shape[way] for way in level))
            level = {
                (*way, number): self._add(tip, token)
                for (way, tip), tokens_C in zip(level.items(), drawn, strict=True)
                for number, token in enumerate(tokens_C[: shape[way]])
            }
        first = level.get((0,) * size)
        if first is None or self._has_ended(first):
            return None
        self._last = first.place
        return torch.tensor(first.tokens, device=state_1D.device)

    def _has_ended(self, tip: _Tip) -> bool:
        return len(tip.tokens) > 0 and tip.tokens[-1] in self._ends

    def _add(self, tip: _Tip, token: int) -> _Tip:
        self._tokens.append(token)
        self._parents.append(tip.place)
        return _Tip(len(self._tokens) - 1, [*tip.tokens, token])

    def _distributions_of(self, state_1D: Tensor, tokens: Sequence[Sequence[int]], size: int) -> Tensor:
        """Distributions of the tokens after the first ones of a chunk, (M, V)."""
        place = len(tokens[0])
        chunks_MK = torch.tensor([[*one, *[0] * (size - place)] for one in tokens], device=state_1D.device)
        # Temperature does not change which tokens are likeliest.
        temperature = self._temperature if self._temperature >= MIN_TEMPERATURE else 1.0
        states_MD = state_1D.expand(len(tokens), -1)
        of_tips_MV = self._head.token_distribution(states_MD, chunks_MK, place, temperature)
        require_finite(of_tips_MV[:, 0])
        return of_tips_MV

    def _candidates(self, of_tips_MV: Tensor, number: int) -> list[list[int]]:
        number = min(number, of_tips_MV.shape[1])
        if self._temperature < MIN_TEMPERATURE:
            return of_tips_MV.topk(number).indices.tolist()
        return draw_distinct(of_tips_MV, number, self._generator).tolist()
