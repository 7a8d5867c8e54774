"""The last step of heads that draw token by token: a vector -> the distribution of a token.

Shapes: M rows, R rows of a part, X size of their vectors, V vocabulary, C classes, G tokens per class,
W = C·G slots of tokens in class order (see `calm.core.classes`); those after the first V are padding.
"""

import abc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calm.core.classes import losses_in_classes, slots_of
from calm.core.cross_entropy import cross_entropy
from calm.core.distillation import SoftTargets, distillation, distillation_of_logits
from calm.models.heads.contract import MIN_TEMPERATURE, TokenDistribution
from calm.models.heads.logits import (
    draw_by_groups,
    draw_from_distributions,
    draw_tokens,
    in_parts,
    likeliest,
    token_distributions,
)

# Logits in class order, with class logits added, in token order, and exponentiated: all in memory at once.
_COPIES_OF_LOGITS = 4
# Tokens whose logits a draft computes, those of the likeliest classes: 4,096 of 49,152 hold 86% of the
# probability, and 97% of the drafted tokens that are accepted at T = 1 (docs/log.md).
_TOKENS_OF_A_DRAFT = 4096


class Vocabulary(abc.ABC):
    """Turns vectors into distributions over the vocabulary."""

    @property
    @abc.abstractmethod
    def numbers_per_row(self) -> int:
        """How many numbers are in memory to compute the distribution of a row; see `in_parts`."""

    @abc.abstractmethod
    def losses(self, vectors_MX: Tensor, tokens_M: Tensor) -> Tensor:
        """Cross-entropy of one token per row, (M,), in nats."""

    @abc.abstractmethod
    def distillation_losses(self, vectors_MX: Tensor, tokens_M: Tensor, soft_targets: SoftTargets) -> Tensor:
        """Distillation loss of one token per row, (M,); see `calm.core.distillation`."""

    @abc.abstractmethod
    def distributions(self, vectors_MX: Tensor, temperature: float = 1.0) -> Iterator[Tensor]:
        """The distribution of each row, (m, V), a few rows at a time."""

    def draft_distribution(self, vectors_MX: Tensor, temperature: float) -> TokenDistribution:
        """A distribution that is like that of each row but cheap, for drafts."""
        p_MV = torch.cat(list(self.distributions(vectors_MX, temperature)))
        return TokenDistribution(p_MV, p_MV.shape[1])

    @abc.abstractmethod
    def draw(self, vectors_MX: Tensor, uniform_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Sample one token per row, (M,), given a uniform number in [0, 1).

        Also returns a number per row, (M,), for `require_finite`: it is not finite if the logits are damaged.
        """

    def choose(self, vectors_MX: Tensor, uniform_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """`draw`, or `likeliest` if the temperature is too low for sampling."""
        if temperature < MIN_TEMPERATURE:
            return self.likeliest(vectors_MX)
        return self.draw(vectors_MX, uniform_M, temperature)

    def likeliest(self, vectors_MX: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row, the first if several tie, and a number as in `draw`, (M,) each."""
        best = [p_MV.max(-1) for p_MV in self.distributions(vectors_MX)]
        return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])

    def probabilities(self, vectors_MX: Tensor, tokens_M: Tensor, temperature: float) -> Tensor:
        """Statistics of each row's distribution, (3, M), in the order of `TokenProbabilities`.

        They are the probability of the given token, the sum of all squared probabilities, and the highest
        probability. If there is more than one part, each is recomputed in the backward pass.
        """

        def statistics(vectors_RX: Tensor, tokens_R: Tensor) -> Tensor:
            (p_RV,) = self.distributions(vectors_RX, temperature)
            of_token_R = p_RV.gather(1, tokens_R.unsqueeze(-1)).squeeze(-1)
            return torch.stack([of_token_R, p_RV.square().sum(-1), p_RV.amax(-1)])

        vector_parts = in_parts(vectors_MX, self.numbers_per_row)
        if len(vector_parts) == 1:
            return statistics(vectors_MX, tokens_M)
        parts = zip(vector_parts, in_parts(tokens_M, self.numbers_per_row), strict=True)
        return torch.cat([checkpoint(statistics, *part, use_reentrant=False) for part in parts], dim=-1)


@dataclass(frozen=True)
class OneSoftmax(Vocabulary):
    """A softmax over the logits of all tokens.

    Args:
        table_VX: One vector per token, whose product with a vector is its logit.
        bias_V: Added to the logits.
    """

    table_VX: Tensor
    bias_V: Tensor | None = None

    @property
    def numbers_per_row(self) -> int:
        """See `Vocabulary`."""
        return len(self.table_VX)

    def losses(self, vectors_MX: Tensor, tokens_M: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return cross_entropy(vectors_MX, self.table_VX, tokens_M, self.bias_V)

    def distillation_losses(self, vectors_MX: Tensor, tokens_M: Tensor, soft_targets: SoftTargets) -> Tensor:
        """See `Vocabulary`."""
        table_VX = self.table_VX
        if self.bias_V is not None:  # It becomes one more column, which is multiplied by 1.
            vectors_MX = torch.cat([vectors_MX, torch.ones_like(vectors_MX[:, :1])], dim=-1)
            table_VX = torch.cat([table_VX, self.bias_V.unsqueeze(-1)], dim=-1)
        return distillation(vectors_MX, table_VX, tokens_M, soft_targets)

    def distributions(self, vectors_MX: Tensor, temperature: float = 1.0) -> Iterator[Tensor]:
        """See `Vocabulary`."""
        return token_distributions(vectors_MX / temperature, self.table_VX, self._bias_at(temperature))

    def draw(self, vectors_MX: Tensor, uniform_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See `Vocabulary`."""
        return draw_tokens(vectors_MX / temperature, self.table_VX, uniform_M, self._bias_at(temperature))

    def likeliest(self, vectors_MX: Tensor) -> tuple[Tensor, Tensor]:
        """See `Vocabulary`."""
        return likeliest(vectors_MX, self.table_VX, self.bias_V)

    def _bias_at(self, temperature: float) -> Tensor | None:
        return None if self.bias_V is None else self.bias_V / temperature


@dataclass(frozen=True)
class ClassedTokens:
    """The logits of tokens that are grouped in classes (see `calm.core.classes`).

    Args:
        table_WX: One vector per slot.
        bias_W: Added to the logits.
        tokens_V: The token in each slot.
        class_size: Tokens per class G; the last may have fewer.
    """

    table_WX: Tensor
    bias_W: Tensor
    tokens_V: Tensor
    class_size: int

    def slots(self, tokens: Tensor) -> Tensor:
        """The slots of tokens; divided by `class_size` and rounded down, they give the classes."""
        return slots_of(self.tokens_V)[tokens]

    def losses(self, vectors_MX: Tensor, slots_M: Tensor) -> Tensor:
        """Cross-entropy of the token in each slot among those of its class, (M,), in nats."""
        table, size = (self.table_WX, self.bias_W), self.class_size
        return losses_in_classes(vectors_MX, *table, slots_M, size, len(self.tokens_V))

    def log_distributions(self, vectors_MX: Tensor) -> Tensor:
        """Log-probabilities within each class, in class order, (M, C, G)."""
        logits_MW = _at_least_float32(F.linear(vectors_MX, self.table_WX, self.bias_W))
        is_padding_W = torch.arange(len(self.table_WX), device=logits_MW.device) >= len(self.tokens_V)
        logits_MCG = logits_MW.masked_fill(is_padding_W, -torch.inf).unflatten(-1, (-1, self.class_size))
        return logits_MCG.log_softmax(-1)

    def log_distributions_of(self, class_MJ: Tensor, vectors_MX: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities within some classes of each row, and their tokens, (M, J, G) each."""
        logits_MJG, slots_MJG = self._logits_of(class_MJ, vectors_MX)
        log_p_MJG = _at_least_float32(logits_MJG).log_softmax(-1)
        return log_p_MJG, self.tokens_V[slots_MJG.clamp_max(len(self.tokens_V) - 1)]

    def _logits_of(self, class_MJ: Tensor, vectors_MX: Tensor) -> tuple[Tensor, Tensor]:
        """Logits within some classes of each row, minus infinity for padding, and their slots, (M, J, G)."""
        size = self.class_size
        slots_MJG = class_MJ.unsqueeze(-1) * size + torch.arange(size, device=class_MJ.device)
        table_MWX = self.table_WX.unflatten(0, (-1, size))[class_MJ].flatten(1, 2)
        logits_MW = torch.bmm(table_MWX, vectors_MX.unsqueeze(-1)).squeeze(-1)
        logits_MJG = logits_MW.view_as(slots_MJG) + self.bias_W[slots_MJG]
        return logits_MJG.masked_fill(slots_MJG >= len(self.tokens_V), -torch.inf), slots_MJG

    def draw(self, class_M: Tensor, vectors_MX: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
        """Sample a token of a given class per row, (M,); also returns a number, as `Vocabulary.draw` does.

        Args:
            class_M: The classes.
            vectors_MX: The vectors that give the token logits.
            uniform_M: Uniform numbers in [0, 1).
        """
        per_row = self.class_size * self.table_WX.shape[1]
        parts = zip(*(in_parts(rows, per_row) for rows in (class_M, vectors_MX, uniform_M)), strict=True)
        tokens, totals = zip(*(self._draw(*part) for part in parts), strict=True)
        return torch.cat(tokens), torch.cat(totals)

    def _draw(self, class_M: Tensor, vectors_MX: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
        logits_M1G, _ = self._logits_of(class_M.unsqueeze(-1), vectors_MX)
        within_M, _, total_M = draw_from_logits(logits_M1G.squeeze(1).float(), uniform_M)
        slot_M = class_M * self.class_size + within_M
        return self.tokens_V[slot_M.clamp_max(len(self.tokens_V) - 1)], total_M


@dataclass(frozen=True)
class TwoSoftmaxes(Vocabulary):
    """A softmax over classes, and one over the tokens of a class (see `calm.core.classes`).

    The first half of a vector gives the class logits, the second the token logits. At temperature 1, a loss
    or a draw needs the logits of C classes and G tokens; other temperatures need those of all tokens.

    Args:
        class_table_CX: One vector per class.
        class_bias_C: Added to the class logits.
        tokens: The tokens in their classes.
    """

    class_table_CX: Tensor
    class_bias_C: Tensor
    tokens: ClassedTokens

    @property
    def numbers_per_row(self) -> int:
        """See `Vocabulary`."""
        return _COPIES_OF_LOGITS * len(self.tokens.table_WX)

    def losses(self, vectors_MX: Tensor, tokens_M: Tensor) -> Tensor:
        """See `Vocabulary`."""
        class_vectors_MX, token_vectors_MX = vectors_MX.chunk(2, dim=-1)
        slots_M = self.tokens.slots(tokens_M)
        classes_M = slots_M // self.tokens.class_size
        class_losses_M = cross_entropy(class_vectors_MX, self.class_table_CX, classes_M, self.class_bias_C)
        return class_losses_M + self.tokens.losses(token_vectors_MX, slots_M)

    def distillation_losses(self, vectors_MX: Tensor, tokens_M: Tensor, soft_targets: SoftTargets) -> Tensor:
        """See `Vocabulary`."""
        size = len(self.tokens.tokens_V)
        return distillation_of_logits(self._log_distribution, size, vectors_MX, tokens_M, soft_targets)

    def distributions(self, vectors_MX: Tensor, temperature: float = 1.0) -> Iterator[Tensor]:
        """See `Vocabulary`."""
        for part_RX in in_parts(vectors_MX, self.numbers_per_row):
            log_p_RV = self._log_distribution(part_RX)
            yield log_p_RV.exp() if temperature == 1 else (log_p_RV / temperature).softmax(-1)

    def draft_distribution(self, vectors_MX: Tensor, temperature: float) -> TokenDistribution:
        """See `Vocabulary`: that of the tokens in the likeliest classes."""
        num_classes = max(1, _TOKENS_OF_A_DRAFT // self.tokens.class_size)
        if num_classes >= len(self.class_table_CX):
            return super().draft_distribution(vectors_MX, temperature)
        class_vectors_MX, token_vectors_MX = vectors_MX.chunk(2, dim=-1)
        likeliest = self._class_log_distribution(class_vectors_MX).topk(num_classes)
        log_p_MJG, tokens_MJG = self.tokens.log_distributions_of(likeliest.indices, token_vectors_MX)
        log_p_MS = (likeliest.values.unsqueeze(-1) + log_p_MJG).flatten(1)
        p_MS = (log_p_MS / temperature).softmax(-1)
        return TokenDistribution(p_MS, len(self.tokens.tokens_V), tokens_MJG.flatten(1))

    def draw(self, vectors_MX: Tensor, uniform_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See `Vocabulary`."""
        if temperature != 1 and torch.compiler.is_compiling():
            return draw_by_groups(self._log_distribution(vectors_MX) / temperature, uniform_M)
        if temperature != 1:
            return draw_from_distributions(self.distributions(vectors_MX, temperature), uniform_M)
        # The uniform number picks the class, and where it lies in the class's interval picks the token.
        class_vectors_MX, token_vectors_MX = vectors_MX.chunk(2, dim=-1)
        logits_MC = F.linear(class_vectors_MX, self.class_table_CX, self.class_bias_C).float()
        class_M, token_uniform_M, class_total_M = draw_from_logits(logits_MC, uniform_M)
        tokens_M, token_total_M = self.tokens.draw(class_M, token_vectors_MX, token_uniform_M)
        return tokens_M, class_total_M + token_total_M

    def _log_distribution(self, vectors_MX: Tensor) -> Tensor:
        """Log-probabilities of each row, (M, V)."""
        class_vectors_MX, token_vectors_MX = vectors_MX.chunk(2, dim=-1)
        log_p_MC = self._class_log_distribution(class_vectors_MX)
        log_p_MW = (log_p_MC.unsqueeze(-1) + self.tokens.log_distributions(token_vectors_MX)).flatten(1)
        return log_p_MW.index_select(-1, slots_of(self.tokens.tokens_V))

    def _class_log_distribution(self, class_vectors_MX: Tensor) -> Tensor:
        """Log-probabilities of the classes, (M, C)."""
        logits_MC = F.linear(class_vectors_MX, self.class_table_CX, self.class_bias_C)
        return _at_least_float32(logits_MC).log_softmax(-1)


def draw_from_logits(logits_MI: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one of I items from the softmax of each row's logits, given a uniform number in [0, 1).

    Returns:
        Three tensors (M,): the index of the item; where the uniform number lies in the item's part of [0, 1),
        as a new uniform number; and a number that is not finite if the logits are damaged.
    """
    weights_MI = (logits_MI - logits_MI.amax(-1, keepdim=True)).exp()
    sums_MI = weights_MI.cumsum(-1)
    total_M1 = sums_MI[:, -1:]
    point_M1 = uniform_M.unsqueeze(-1).to(sums_MI.dtype) * total_M1
    index_I = torch.arange(logits_MI.shape[1], device=logits_MI.device)
    last_M1 = torch.where(weights_MI > 0, index_I, 0).amax(-1, keepdim=True)
    chosen_M1 = (sums_MI <= point_M1).sum(-1, keepdim=True).minimum(last_M1)
    before_M1 = torch.where(chosen_M1 > 0, sums_MI.gather(1, (chosen_M1 - 1).clamp_min(0)), 0)
    width_M1 = sums_MI.gather(1, chosen_M1) - before_M1
    # If rounding leaves no width, take the middle. A point on the lower edge stands for all that round to it,
    # so it does not become 0, which would draw the first item of the next softmax even at probability 0.
    fraction_M1 = torch.where(width_M1 > 0, (point_M1 - before_M1) / width_M1, 0.5)
    new_uniform_M1 = fraction_M1.clamp(2**-25, 1 - 2**-24)
    return chosen_M1.squeeze(-1), new_uniform_M1.squeeze(-1), total_M1.squeeze(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
