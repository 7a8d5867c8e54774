"""A draft that may branch: a tree of tokens, each with the index of its parent.

Shapes: G drafted tokens, the nodes of the tree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TEXT = -1
"""The node that stands for the last token of the text: the root of the tree."""


@dataclass(frozen=True)
class Branches:
    """A tree of drafted tokens. A node is the index of its token in the list.

    Args:
        tokens_G: The tokens.
        parents_G: The parent of each node, which comes earlier in the list, or `TEXT`.
    """

    tokens_G: Sequence[int] = ()
    parents_G: Sequence[int] = ()

    @classmethod
    def line(cls, tokens_G: Sequence[int]) -> "Branches":
        """A draft without branches."""
        return cls(tokens_G, range(TEXT, TEXT + len(tokens_G)))

    def __len__(self) -> int:
        """Number of drafted tokens."""
        return len(self.tokens_G)

    @cached_property
    def children(self) -> Mapping[int, Sequence[int]]:
        """Children of each node that has any, in order."""
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents_G):
            children.setdefault(parent, []).append(node)
        return children

    @cached_property
    def depths(self) -> Sequence[int]:
        """Number of drafted tokens before each token on its path."""
        depths: list[int] = []
        for parent in self.parents_G:
            depths.append(0 if parent == TEXT else depths[parent] + 1)
        return depths

    @property
    def longest(self) -> int:
        """Number of tokens on the longest path."""
        return max(self.depths, default=-1) + 1

    @property
    def is_line(self) -> bool:
        """Whether the draft has no branches, with tokens listed in order."""
        return list(self.parents_G) == list(range(TEXT, TEXT + len(self)))

    def tokens_to(self, node: int) -> list[int]:
        """Drafted tokens on the path from the text to a node, inclusive."""
        tokens: list[int] = []
        while node != TEXT:
            tokens.append(self.tokens_G[node])
            node = self.parents_G[node]
        return tokens[::-1]

    def subtree(self, nodes: Sequence[int]) -> "Branches":
        """The tree of some nodes only, numbered in the given order; each must come after its parent."""
        new_of = {TEXT: TEXT} | {node: index for index, node in enumerate(nodes)}
        tokens = [self.tokens_G[node] for node in nodes]
        return Branches(tokens, [new_of[self.parents_G[node]] for node in nodes])

    def sees(self) -> Tensor:
        """Whether a token (row) is another (column) or a descendant of it: an attention mask, (G, G)."""
        sees_GG = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents_G):
            if parent != TEXT:
                sees_GG[node] |= sees_GG[parent]
        return sees_GG
