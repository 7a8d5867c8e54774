"""The last step of heads that draw token by token: a vector -> the distribution of a token.

Shapes: M rows, R rows of a part, X size of their vectors, V vocabulary, C classes, G tokens per class,
W = C·G places in class order, of which those after the V-th have no token.
"""

import abc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calm.core.classes import losses_in_classes, places_of
from calm.core.cross_entropy import cross_entropy
from calm.core.distillation import SoftTargets, distillation, distillation_of_scores
from calm.models.heads.contract import MIN_TEMPERATURE
from calm.models.heads.scores import (
    draw_by_sums,
    draw_in_two_steps,
    draw_tokens,
    in_parts,
    likeliest,
    token_distributions,
)

_TABLES_AT_ONCE = 4  # Logits in class order, with class logits added, in token order, exponentiated.


class Vocabulary(abc.ABC):
    """Turns vectors into distributions over the vocabulary."""

    @property
    @abc.abstractmethod
    def numbers_of_row(self) -> int:
        """How many numbers it takes to compute the distribution of a row; see `in_parts`."""

    @abc.abstractmethod
    def losses(self, vectors_MX: Tensor, tokens_M: Tensor) -> Tensor:
        """Cross-entropy of one token per row, (M,), in nats."""

    @abc.abstractmethod
    def distillation_losses(self, vectors_MX: Tensor, tokens_M: Tensor, soft_targets: SoftTargets) -> Tensor:
        """Distillation loss of one token per row, (M,); see `calm.core.distillation`."""

    @abc.abstractmethod
    def distributions(self, vectors_MX: Tensor, temperature: float = 1.0) -> Iterator[Tensor]:
        """The distribution of each row, (m, V), a few rows at a time."""

    @abc.abstractmethod
    def draw(self, vectors_MX: Tensor, uniform_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Sample one token per row, (M,), from a uniform number in [0, 1); also returns a number that is
        finite if the row's logits are, (M,)."""

    def choose(self, vectors_MX: Tensor, uniform_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """`draw`, or `likeliest` if the temperature is too low to sample at."""
        if temperature < MIN_TEMPERATURE:
            return self.likeliest(vectors_MX)
        return self.draw(vectors_MX, uniform_M, temperature)

    def likeliest(self, vectors_MX: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row, (M,), the first of equals, and a number as from `draw`, (M,)."""
        best = [p_MV.max(-1) for p_MV in self.distributions(vectors_MX)]
        return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])

    def probabilities(self, vectors_MX: Tensor, tokens_M: Tensor, temperature: float) -> Tensor:
        """Of each row's distribution: probability of a token, sum of all squares, and the highest, (3, M).

        If there is more than one part, each is recomputed in the backward pass.
        """

        def of_part(part_RX: Tensor, tokens_R: Tensor) -> Tensor:
            (p_RV,) = self.distributions(part_RX, temperature)
            of_token_R = p_RV.gather(1, tokens_R.unsqueeze(-1)).squeeze(-1)
            return torch.stack([of_token_R, p_RV.square().sum(-1), p_RV.amax(-1)])

        parts = in_parts(vectors_MX, self.numbers_of_row)
        if len(parts) == 1:
            return of_part(vectors_MX, tokens_M)
        of_parts = zip(parts, in_parts(tokens_M, self.numbers_of_row), strict=True)
        found = [checkpoint(of_part, *part, use_reentrant=False) for part in of_parts]
        return torch.cat(found, dim=-1)


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
    def numbers_of_row(self) -> int:
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
        table_WX: One vector per place in class order.
        bias_W: Added to the logits.
        tokens_V: The token at each place.
        class_size: Tokens per class G; the last may have fewer.
    """

    table_WX: Tensor
    bias_W: Tensor
    tokens_V: Tensor
    class_size: int

    def places(self, tokens: Tensor) -> Tensor:
        """The places of tokens; divided by `class_size` and rounded down, they give the classes."""
        return places_of(self.tokens_V)[tokens]

    def losses(self, vectors_MX: Tensor, places_M: Tensor) -> Tensor:
        """Cross-entropy of the token at each place among those of its class, (M,), in nats."""
        table, size = (self.table_WX, self.bias_W), self.class_size
        return losses_in_classes(vectors_MX, *table, places_M, size, len(self.tokens_V))

    def log_distributions(self, vectors_MX: Tensor) -> Tensor:
        """Log-probabilities within each class, in class order, (M, C, G)."""
        scores_MW = _wide(F.linear(vectors_MX, self.table_WX, self.bias_W))
        is_none_W = torch.arange(len(self.table_WX), device=scores_MW.device) >= len(self.tokens_V)
        scores_MCG = scores_MW.masked_fill(is_none_W, -torch.inf).unflatten(-1, (-1, self.class_size))
        return scores_MCG.log_softmax(-1)

    def draw(self, class_M: Tensor, vectors_MX: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
        """Sample a token of a given class per row, (M,); also returns a number as `Vocabulary.draw` does.

        Args:
            class_M: The classes.
            vectors_MX: The vectors that give the token logits.
            uniform_M: Uniform numbers in [0, 1).
        """
        numbers = self.class_size * self.table_WX.shape[1]
        parts = zip(*(in_parts(rows, numbers) for rows in (class_M, vectors_MX, uniform_M)), strict=True)
        tokens, totals = zip(*(self._draw(*part) for part in parts), strict=True)
        return torch.cat(tokens), torch.cat(totals)

    def _draw(self, class_M: Tensor, vectors_MX: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
        size, last = self.class_size, len(self.tokens_V) - 1
        places_MG = class_M.unsqueeze(-1) * size + torch.arange(size, device=class_M.device)
        table_MGX = self.table_WX.unflatten(0, (-1, size))[class_M]
        scores_MG = torch.bmm(table_MGX, vectors_MX.unsqueeze(-1)).squeeze(-1) + self.bias_W[places_MG]
        scores_MG = scores_MG.float().masked_fill(places_MG > last, -torch.inf)
        within_M, _, total_M = choose_by_sums(scores_MG, uniform_M)
        return self.tokens_V[(class_M * size + within_M).clamp_max(last)], total_M


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
    def numbers_of_row(self) -> int:
        """See `Vocabulary`."""
        return _TABLES_AT_ONCE * len(self.tokens.table_WX)

    def losses(self, vectors_MX: Tensor, tokens_M: Tensor) -> Tensor:
        """See `Vocabulary`."""
        of_class_MX, of_token_MX = vectors_MX.chunk(2, dim=-1)
        places_M = self.tokens.places(tokens_M)
        classes_M = places_M // self.tokens.class_size
        of_class_M = cross_entropy(of_class_MX, self.class_table_CX, classes_M, self.class_bias_C)
        return of_class_M + self.tokens.losses(of_token_MX, places_M)

    def distillation_losses(self, vectors_MX: Tensor, tokens_M: Tensor, soft_targets: SoftTargets) -> Tensor:
        """See `Vocabulary`."""
        size = len(self.tokens.tokens_V)
        return distillation_of_scores(self._log_distribution, size, vectors_MX, tokens_M, soft_targets)

    def distributions(self, vectors_MX: Tensor, temperature: float = 1.0) -> Iterator[Tensor]:
        """See `Vocabulary`."""
        for part_MX in in_parts(vectors_MX, self.numbers_of_row):
            log_p_MV = self._log_distribution(part_MX)
            yield log_p_MV.exp() if temperature == 1 else (log_p_MV / temperature).softmax(-1)

    def draw(self, vectors_MX: Tensor, uniform_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See `Vocabulary`."""
        if temperature != 1 and torch.compiler.is_compiling():
            return draw_in_two_steps(self._log_distribution(vectors_MX) / temperature, uniform_M)
        if temperature != 1:
            return draw_by_sums(self.distributions(vectors_MX, temperature), uniform_M)
        # The uniform number picks the class, and its position within the class's interval picks the token.
        of_class_MX, of_token_MX = vectors_MX.chunk(2, dim=-1)
        scores_MC = F.linear(of_class_MX, self.class_table_CX, self.class_bias_C).float()
        class_M, rest_M, total_M = choose_by_sums(scores_MC, uniform_M)
        tokens_M, of_class_M = self.tokens.draw(class_M, of_token_MX, rest_M)
        return tokens_M, total_M + of_class_M

    def _log_distribution(self, vectors_MX: Tensor) -> Tensor:
        """Log-probabilities of each row, (M, V)."""
        of_class_MX, of_token_MX = vectors_MX.chunk(2, dim=-1)
        classes_MC = _wide(F.linear(of_class_MX, self.class_table_CX, self.class_bias_C)).log_softmax(-1)
        log_p_MW = (classes_MC.unsqueeze(-1) + self.tokens.log_distributions(of_token_MX)).flatten(1)
        return log_p_MW.index_select(-1, places_of(self.tokens.tokens_V))


def choose_by_sums(scores_MX: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample from the softmax of each row's logits, given a uniform number in [0, 1).

    Returns:
        The choice; where the number lies in the choice's part of [0, 1), as a new uniform number; and a
        number that is finite if the logits are. Each has shape (M,).
    """
    weights_MX = (scores_MX - scores_MX.amax(-1, keepdim=True)).exp()
    sums_MX = weights_MX.cumsum(-1)
    total_M1 = sums_MX[:, -1:]
    point_M1 = uniform_M.unsqueeze(-1).to(sums_MX.dtype) * total_M1
    places_X = torch.arange(scores_MX.shape[1], device=scores_MX.device)
    last_M1 = torch.where(weights_MX > 0, places_X, 0).amax(-1, keepdim=True)
    chosen_M1 = (sums_MX <= point_M1).sum(-1, keepdim=True).minimum(last_M1)
    before_M1 = torch.where(chosen_M1 > 0, sums_MX.gather(1, (chosen_M1 - 1).clamp_min(0)), 0)
    width_M1 = sums_MX.gather(1, chosen_M1) - before_M1
    # A number on the lower edge stands for all that round to it. The result is never 0, which would choose
    # the first item of the next step even if that has probability 0.
    rest_M1 = torch.where(width_M1 > 0, (point_M1 - before_M1) / width_M1, 0.5).clamp(2**-25, 1 - 2**-24)
    return chosen_M1.squeeze(-1), rest_M1.squeeze(-1), total_M1.squeeze(-1)


def _wide(scores: Tensor) -> Tensor:
    """Logits in float32 or wider."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
