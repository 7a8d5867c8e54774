"""A draft that may branch: a tree of tokens, each with the index of its parent.

Shapes: G drafted tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TEXT = -1
"""The index that stands for the last token of the text: the root of the tree."""


@dataclass(frozen=True)
class Branches:
    """A tree of drafted tokens. The place of a token is its index in the list.

    Args:
        tokens_G: The tokens.
        parents_G: Place of each token's parent, which comes earlier in the list, or `TEXT`.
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
        """Children of each place that has any, in order."""
        found: dict[int, list[int]] = {}
        for place, parent in enumerate(self.parents_G):
            found.setdefault(parent, []).append(place)
        return found

    @cached_property
    def depths(self) -> Sequence[int]:
        """Number of drafted tokens before each token on its path."""
        found: list[int] = []
        for parent in self.parents_G:
            found.append(0 if parent == TEXT else found[parent] + 1)
        return found

    @property
    def longest(self) -> int:
        """Number of tokens on the longest path."""
        return max(self.depths, default=-1) + 1

    @property
    def is_line(self) -> bool:
        """Whether the draft has no branches, with tokens listed in order."""
        return list(self.parents_G) == list(range(TEXT, TEXT + len(self)))

    def tokens_to(self, place: int) -> list[int]:
        """Drafted tokens on the path from the text to a place, inclusive."""
        tokens: list[int] = []
        while place != TEXT:
            tokens.append(self.tokens_G[place])
            place = self.parents_G[place]
        return tokens[::-1]

    def part(self, places: Sequence[int]) -> "Branches":
        """The subtree at some places, which must include the ancestors of each."""
        new = {TEXT: TEXT} | {place: number for number, place in enumerate(places)}
        tokens = [self.tokens_G[place] for place in places]
        return Branches(tokens, [new[self.parents_G[place]] for place in places])

    def sees(self) -> Tensor:
        """Whether a token (row) is another (column) or a descendant of it: an attention mask, (G, G)."""
        sees_GG = torch.eye(len(self), dtype=torch.bool)
        for place, parent in enumerate(self.parents_G):
            if parent != TEXT:
                sees_GG[place] |= sees_GG[parent]
        return sees_GG
