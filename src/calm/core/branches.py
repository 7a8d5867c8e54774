"""A draft that may go on in several ways: tokens, each with the place of the one before it.

Shapes: G drafted tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TEXT = -1
"""The place of the text's last token, where a draft begins."""


@dataclass(frozen=True)
class Branches:
    """Tokens that may come next. Their places are their numbers, from 0 on.

    Args:
        tokens_G: The tokens.
        parents_G: Place of the token before each, which comes earlier in the list, or `TEXT`.
    """

    tokens_G: Sequence[int] = ()
    parents_G: Sequence[int] = ()

    @classmethod
    def line(cls, tokens_G: Sequence[int]) -> "Branches":
        """A draft that goes on in one way."""
        return cls(tokens_G, range(TEXT, TEXT + len(tokens_G)))

    def __len__(self) -> int:
        """Number of drafted tokens."""
        return len(self.tokens_G)

    @cached_property
    def children(self) -> Mapping[int, Sequence[int]]:
        """Places that follow a place, in their order, if there are any."""
        found: dict[int, list[int]] = {}
        for place, parent in enumerate(self.parents_G):
            found.setdefault(parent, []).append(place)
        return found

    @cached_property
    def depths(self) -> Sequence[int]:
        """Drafted tokens before each."""
        found: list[int] = []
        for parent in self.parents_G:
            found.append(0 if parent == TEXT else found[parent] + 1)
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest way."""
        return max(self.depths, default=-1) + 1

    @property
    def is_line(self) -> bool:
        """Whether each token follows the one before it in the list."""
        return list(self.parents_G) == list(range(TEXT, TEXT + len(self)))

    def tokens_to(self, place: int) -> list[int]:
        """Drafted tokens from the text to a place, its own included."""
        tokens: list[int] = []
        while place != TEXT:
            tokens.append(self.tokens_G[place])
            place = self.parents_G[place]
        return tokens[::-1]

    def part(self, places: Sequence[int]) -> "Branches":
        """Some of the tokens, each with all that come before it."""
        new = {TEXT: TEXT} | {place: number for number, place in enumerate(places)}
        tokens = [self.tokens_G[place] for place in places]
        return Branches(tokens, [new[self.parents_G[place]] for place in places])

    def sees(self) -> Tensor:
        """Whether a token (row) follows another (column), or is that itself, (G, G)."""
        sees_GG = torch.eye(len(self), dtype=torch.bool)
        for place, parent in enumerate(self.parents_G):
            if parent != TEXT:
                sees_GG[place] |= sees_GG[parent]
        return sees_GG
