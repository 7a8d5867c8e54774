"""Grows a draft tree token by token.

Shapes: M leaves, C candidates for the token after a leaf, K tokens per chunk, X size of what the head
prepares, V vocabulary.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from calm.core.branches import TEXT, Branches
from calm.core.speculative import draw_distinct
from calm.models.heads import TokenDistribution, TokenDistributions
from calm.models.heads.contract import MIN_TEMPERATURE, require_finite

TreePath = tuple[int, ...]
"""A path from the start of a chunk to a node: for each token, its rank among the candidates, from 0."""

Shape = Mapping[TreePath, int]
"""The shape of a chunk's tree: how many candidates follow each path."""

# How often the first, second, ... candidate at a node is the accepted one (docs/log.md).
_ACCEPTANCE_RATES = (0.42, 0.11, 0.06, 0.04, 0.025, 0.02, 0.015, 0.01)


def line_shape(depth: int) -> Shape:
    """A single path: one candidate per node."""
    return {(0,) * length: 1 for length in range(depth)}


@cache
def best_shape(num_tokens: int, depth: int) -> Shape:
    """The tree with the most accepted tokens on average, at the measured rates.

    A path is accepted with the product of its tokens' rates, and the best tree consists of the paths with the
    highest products (Chen et al., arXiv 2402.12374).

    Args:
        num_tokens: Tokens in total.
        depth: Maximum length of a path.
    """
    rates = _ACCEPTANCE_RATES
    shape: dict[TreePath, int] = {}
    # The paths that may be added next, with their negated products: the highest product comes first.
    heap: list[tuple[float, TreePath]] = [(-rates[0], (0,))]
    while heap and sum(shape.values()) < num_tokens:
        negated, (*parent, rank) = heapq.heappop(heap)
        shape[tuple(parent)] = rank + 1
        if rank + 1 < len(rates):
            heapq.heappush(heap, (negated / rates[rank] * rates[rank + 1], (*parent, rank + 1)))
        if len(parent) + 1 < depth:
            heapq.heappush(heap, (negated * rates[0], (*parent, rank, 0)))
    return shape


class _Leaf(NamedTuple):
    """A node where the draft may continue, and the tokens of its chunk up to there."""

    node: int
    tokens: Sequence[int]


class GrowingTree:
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
        self._distributions: dict[int, TokenDistribution] = {}
        self._root = TEXT  # Where the next chunk starts.

    @property
    def branches(self) -> Branches:
        """The tree so far."""
        return Branches(self._tokens, self._parents)

    def distribution_at(self, node: int) -> Tensor:
        """The distribution, (V,), from which the children of a node were drawn."""
        return self._distributions[node].over_vocabulary()[0]

    def add_chunk(self, prepared_1X: Tensor, size: int, shape: Shape, max_length: int) -> Tensor | None:
        """Grow a chunk after the first candidates of the previous one.

        Args:
            prepared_1X: Output of the head's `prepare` for the state of the previous chunk.
            size: Tokens per chunk K.
            shape: Number of candidates at each node.
            max_length: Maximum length of a path in this chunk.

        Returns:
            Its first candidates, (K,), if they form a chunk that another may follow.
        """
        leaves: dict[TreePath, _Leaf] = {(): _Leaf(self._root, ())}
        for _ in range(min(size, max_length)):
            leaves = {
                path: leaf for path, leaf in leaves.items() if path in shape and not self._has_ended(leaf)
            }
            if not leaves:
                return None
            distribution = self._distribution_after(list(leaves.values()), prepared_1X, size)
            candidates = self._candidates(distribution, max(shape[path] for path in leaves))
            next_leaves: dict[TreePath, _Leaf] = {}
            for row, ((path, leaf), tokens_C) in enumerate(zip(leaves.items(), candidates, strict=True)):
                self._distributions[leaf.node] = distribution.row(row)
                for rank, token in enumerate(tokens_C[: shape[path]]):
                    next_leaves[(*path, rank)] = self._add(leaf, token)
            leaves = next_leaves
        first = leaves.get((0,) * size)
        if first is None or self._has_ended(first):
            return None
        self._root = first.node
        return torch.tensor(first.tokens, device=prepared_1X.device)

    def _has_ended(self, leaf: _Leaf) -> bool:
        return len(leaf.tokens) > 0 and leaf.tokens[-1] in self._ends

    def _add(self, parent: _Leaf, token: int) -> _Leaf:
        self._tokens.append(token)
        self._parents.append(parent.node)
        return _Leaf(len(self._tokens) - 1, [*parent.tokens, token])

    def _distribution_after(
        self, leaves: Sequence[_Leaf], prepared_1X: Tensor, size: int
    ) -> TokenDistribution:
        """The distribution of the token after each leaf, in M rows; all are at the same depth."""
        depth = len(leaves[0].tokens)
        padding = [0] * (size - depth)
        chunks_MK = torch.tensor([[*leaf.tokens, *padding] for leaf in leaves], device=prepared_1X.device)
        # Temperature does not change which tokens are likeliest.
        temperature = self._temperature if self._temperature >= MIN_TEMPERATURE else 1.0
        prepared_MX = prepared_1X.expand(len(leaves), -1)
        distribution = self._head.draft_distribution(prepared_MX, chunks_MK, depth, temperature)
        require_finite(distribution.p_MS[:, 0])
        return distribution

    def _candidates(self, distribution: TokenDistribution, number: int) -> list[list[int]]:
        """Candidates for the token after each leaf, (M, C), best or drawn first."""
        p_MS, tokens_MS = distribution.p_MS, distribution.tokens_MS
        number = min(number, p_MS.shape[1])
        if self._temperature < MIN_TEMPERATURE:
            chosen_MC = p_MS.topk(number).indices
        else:
            chosen_MC = draw_distinct(p_MS, number, self._generator)
        return (chosen_MC if tokens_MS is None else tokens_MS.gather(1, chosen_MC)).tolist()
