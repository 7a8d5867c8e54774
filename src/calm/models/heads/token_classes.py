"""What heads have in common that choose a token in two steps, by its class (see `calm.core.classes`).

Shapes: V vocabulary, C classes, G tokens of a class, W places, N kinds of neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.core.classes import classes_by_neighbours
from calm.models.blocks import PartedLinear
from calm.models.heads.fields import check_counts
from calm.models.heads.token_head import TokenHead, TokenHeadConfig
from calm.models.heads.vocabulary import ClassedTokens

_NEVER = -100.0  # The logarithm of what is never seen.


@dataclass(kw_only=True)
class TokenClassesConfig(TokenHeadConfig):
    """Fields of such heads.

    Args:
        num_classes: Classes of tokens; 1 is a single softmax over the vocabulary.

    The others are those of `TokenHeadConfig`.
    """

    num_classes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_classes")

    @property
    def class_size(self) -> int:
        """Tokens of a class; the last may have fewer."""
        return -(-self.vocab_size // self.num_classes)

    @property
    def num_filled_classes(self) -> int:
        """Classes that have a token: of equal size, fewer than were asked for may hold all."""
        return -(-self.vocab_size // self.class_size)


class TokenClassesHead(TokenHead):
    """A head whose last layers score classes, and the tokens of a class."""

    config: TokenClassesConfig
    class_scores: PartedLinear
    """Vectors -> scores of classes, if there are classes. `scores` are then those of places."""
    tokens_by_class: Tensor
    """Tokens class after class, (V,), if there are classes."""

    def _add_scores(self, class_rank: int) -> None:
        """Add the last layers.

        Args:
            class_rank: Size of the vector that meets the classes.
        """
        config = self.config
        if config.num_classes == 1:
            self.scores = PartedLinear(config.rank, config.vocab_size)
            return
        self.class_scores = PartedLinear(class_rank, config.num_filled_classes)
        # Of places; those at the end may be of no token.
        self.scores = PartedLinear(config.rank, config.num_filled_classes * config.class_size)
        self.register_buffer("tokens_by_class", torch.arange(config.vocab_size))

    def _classed_tokens(self) -> ClassedTokens:
        """The tokens of the classes, if there are classes."""
        scores, size = self.scores, self.config.class_size
        return ClassedTokens(scores.weight, scores.bias, self.tokens_by_class, size)

    def check_loaded(self) -> None:
        """See `GenerativeHead`: every token has a place in a class."""
        if self.config.num_classes == 1:
            return
        expected_V = torch.arange(self.config.vocab_size, device=self.tokens_by_class.device)
        if not torch.equal(self.tokens_by_class.sort().values, expected_V):
            raise ValueError("head.tokens_by_class must hold every token once; the file is damaged.")

    @torch.no_grad()
    def init_from_neighbours(self, count_neighbours: Callable[[], Tensor]) -> None:
        """See `GenerativeHead`: tokens with like neighbours come into the same class."""
        if self.config.num_classes == 1:
            return
        counts_VN = count_neighbours()
        counts_VN = F.pad(counts_VN, (0, 0, 0, self.config.vocab_size - len(counts_VN)))
        self.tokens_by_class.copy_(classes_by_neighbours(counts_VN, self.config.class_size))

    @torch.no_grad()
    def init_from_counts(self, count_tokens: Callable[[], Tensor]) -> None:
        """See `GenerativeHead`: every token's distribution starts as that of single tokens."""
        if self.config.num_classes == 1 or not self.config.bias_from_text:
            super().init_from_counts(count_tokens)
            return
        seen_V = self._seen(count_tokens)[self.tokens_by_class]
        seen_CG = F.pad(seen_V, (0, len(self.scores.bias) - len(seen_V))).view(-1, self.config.class_size)
        of_class_C1 = seen_CG.sum(-1, keepdim=True)
        self.class_scores.bias.copy_((of_class_C1 / of_class_C1.sum()).log().flatten())
        self.scores.bias.copy_((seen_CG / of_class_C1).log().clamp_min(_NEVER).flatten())
