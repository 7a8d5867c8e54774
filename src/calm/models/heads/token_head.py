"""Base class of the heads that learn tokens by cross-entropy, with logits over the whole vocabulary.

Shapes: V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.models.blocks import SlicedLinear
from calm.models.heads.contract import MIN_TEMPERATURE, GenerativeHead
from calm.models.heads.fields import HeadConfig, check_counts


@dataclass(kw_only=True)
class TokenHeadConfig(HeadConfig):
    """Fields of heads with vocabulary logits.

    Args:
        rank: Size of a token's vector before the vocabulary logits.
        bias_from_text: Whether a new model's output bias is initialized from token frequencies in its text.
        vocab_size: Size of the vocabulary; the model fills it in.
        chunk_size: Tokens per chunk; the model fills it in.
    """

    rank: int = 64
    bias_from_text: bool = True
    vocab_size: int = 1
    chunk_size: int = 1

    needs_codes: ClassVar[bool] = True
    lowest_temperature: ClassVar[float] = MIN_TEMPERATURE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "rank", "vocab_size", "chunk_size")


class TokenHead(GenerativeHead):
    """A head whose last layer outputs vocabulary logits."""

    config: TokenHeadConfig
    scores: SlicedLinear
    """The last layer: token vectors -> vocabulary logits."""

    @torch.no_grad()
    def init_from_counts(self, count_tokens: Callable[[], Tensor]) -> None:
        """See `GenerativeHead`: every predicted distribution starts as the unigram distribution."""
        if self.config.bias_from_text:
            counts_V = self._smoothed_counts(count_tokens)
            self.scores.bias.copy_((counts_V / counts_V.sum()).log())

    def _smoothed_counts(self, count_tokens: Callable[[], Tensor]) -> Tensor:
        """Count of each token of the head's vocabulary, (V,), plus one half, so that none is 0."""
        counts_V = count_tokens().double()
        return F.pad(counts_V, (0, self.config.vocab_size - len(counts_V))) + 0.5
