"""Base class of the heads that read the tokens of the previous chunk, with a one- or two-step softmax.

In two steps, the first chooses a class, the second a token of that class: see `calm.core.classes`.

Shapes: P positions, K tokens per chunk, D hidden size, E size of a token embedding, V vocabulary, C classes,
G tokens per class, N kinds of neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.core.classes import classes_by_neighbours
from calm.models.blocks import SlicedLinear
from calm.models.heads.fields import check_counts
from calm.models.heads.token_head import TokenHead, TokenHeadConfig
from calm.models.heads.vocabulary import ClassedTokens, OneSoftmax, TwoSoftmaxes, Vocabulary

_LOG_OF_ZERO = -100.0  # Bias of the padding in the last class: all weights of a checkpoint must be finite.


@dataclass(kw_only=True)
class TokenClassesConfig(TokenHeadConfig):
    """Fields of these heads.

    Args:
        num_classes: Number of token classes; 1 is a single softmax over the vocabulary.
        num_blocks: Residual blocks.
        token_size: Size of the head's own token embeddings.
        layer_norm_eps: Epsilon of the norms.

    For the other fields, see `TokenHeadConfig`.
    """

    num_classes: int = 1
    num_blocks: int = 2
    token_size: int = 64
    layer_norm_eps: float = 1e-6

    decodes_latents: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_classes", "num_blocks", "token_size")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be above 0, got {self.layer_norm_eps}.")

    @property
    def extra_state_size(self) -> int:
        """See `HeadConfig`: the embeddings of the K tokens of a chunk."""
        return self.chunk_size * self.token_size

    @property
    def class_size(self) -> int:
        """Tokens per class; the last may have fewer."""
        return -(-self.vocab_size // self.num_classes)

    @property
    def num_filled_classes(self) -> int:
        """Classes that contain a token; rounding up their size may leave fewer than `num_classes`."""
        return -(-self.vocab_size // self.class_size)

    @property
    def vector_size(self) -> int:
        """Size of the vector that gives the logits; with classes, one half is for the class logits."""
        return self.rank if self.num_classes == 1 else 2 * self.rank

    @property
    def num_logits(self) -> int:
        """Logits computed per token at temperature 1."""
        return self.vocab_size if self.num_classes == 1 else self.num_filled_classes + self.class_size

    @property
    def num_all_logits(self) -> int:
        """Logits for the full distribution of a token: of all classes, and of all tokens and padding."""
        if self.num_classes == 1:
            return self.vocab_size
        return self.num_filled_classes * (1 + self.class_size)


class TokenClassesHead(TokenHead):
    """A head whose last layers output logits of classes, and of the tokens in a class.

    Its states are the backbone's, followed by its own embeddings of the previous chunk, (P, D + K·E).
    """

    config: TokenClassesConfig
    class_scores: SlicedLinear
    """Vectors -> class logits, if there are classes; the rows of `scores` are then in class order."""
    tokens_by_class: Tensor
    """Tokens in class order, (V,), if there are classes."""

    def __init__(self, config: TokenClassesConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.token_size)

    def embed_chunks(self, chunks_BCK: Tensor) -> Tensor:
        """See `GenerativeHead`: the concatenated embeddings of the chunk's tokens."""
        return self.embed_tokens(chunks_BCK).flatten(-2)

    def _split_states(self, states_PD: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's state, (P, D), and the embeddings of the previous chunk, (P, K·E)."""
        state_PD, previous_PX = states_PD.split([self.hidden_size, self.config.extra_state_size], dim=-1)
        return state_PD, previous_PX

    def _add_output_layers(self, class_rank: int) -> None:
        """Add the layers that compute logits.

        Args:
            class_rank: Size of the vector before the class logits.
        """
        config = self.config
        if config.num_classes == 1:
            self.scores = SlicedLinear(config.rank, config.vocab_size)
            return
        self.class_scores = SlicedLinear(class_rank, config.num_filled_classes)
        # In class order; the last class may be padded.
        self.scores = SlicedLinear(config.rank, config.num_filled_classes * config.class_size)
        self.register_buffer("tokens_by_class", torch.arange(config.vocab_size))

    def _output_layers(self) -> list[nn.Module]:
        """The layers that compute logits."""
        return [self.scores] if self.config.num_classes == 1 else [self.class_scores, self.scores]

    def _classed_tokens(self) -> ClassedTokens:
        """The tokens in their classes, if there are classes."""
        scores, size = self.scores, self.config.class_size
        return ClassedTokens(scores.weight, scores.bias, self.tokens_by_class, size)

    def _vocabulary(self) -> Vocabulary:
        """The vocabulary for vectors of `vector_size`; with classes, their first half gives the class."""
        if self.config.num_classes == 1:
            return OneSoftmax(self.scores.weight, self.scores.bias)
        return TwoSoftmaxes(self.class_scores.weight, self.class_scores.bias, self._classed_tokens())

    def check_loaded(self) -> None:
        """See `GenerativeHead`: every token must be in a class, once."""
        if self.config.num_classes == 1:
            return
        expected_V = torch.arange(self.config.vocab_size, device=self.tokens_by_class.device)
        if not torch.equal(self.tokens_by_class.sort().values, expected_V):
            raise ValueError(
                "head.tokens_by_class must contain every token exactly once; the file is damaged."
            )

    @torch.no_grad()
    def init_from_neighbours(self, count_neighbours: Callable[[], Tensor]) -> None:
        """See `GenerativeHead`: tokens with similar neighbours go into the same class."""
        if self.config.num_classes == 1:
            return
        counts_VN = count_neighbours()
        counts_VN = F.pad(counts_VN, (0, 0, 0, self.config.vocab_size - len(counts_VN)))
        self.tokens_by_class.copy_(classes_by_neighbours(counts_VN, self.config.class_size))

    @torch.no_grad()
    def init_from_counts(self, count_tokens: Callable[[], Tensor]) -> None:
        """See `GenerativeHead`: every predicted distribution starts as the unigram distribution."""
        if self.config.num_classes == 1 or not self.config.bias_from_text:
            super().init_from_counts(count_tokens)
            return
        counts_V = self._smoothed_counts(count_tokens)[self.tokens_by_class]
        padding = len(self.scores.bias) - len(counts_V)
        counts_CG = F.pad(counts_V, (0, padding)).view(-1, self.config.class_size)
        class_counts_C1 = counts_CG.sum(-1, keepdim=True)
        self.class_scores.bias.copy_((class_counts_C1 / class_counts_C1.sum()).log().flatten())
        self.scores.bias.copy_((counts_CG / class_counts_C1).log().clamp_min(_LOG_OF_ZERO).flatten())
