"""What heads have in common that draw the tokens of a chunk one after another: likelihoods and draws.

Shapes: N draws, P positions, K tokens per chunk, D state size, V vocabulary, X size of vectors, M rows.
"""

import abc
from typing import Any

import torch
from torch import Tensor

from calm.core.cross_entropy import cross_entropy
from calm.core.distillation import Teaching, distillation
from calm.core.random import Randomness, uniform
from calm.models.heads.contract import MIN_TEMPERATURE, GenerativeHead, Target, TokenProbabilities
from calm.models.heads.scores import draw_tokens, likeliest, probabilities, token_distributions


class TokenByTokenHead(GenerativeHead):
    """Draws one token after another; fulfils `Likelihood`, `TokenDistributions` and `Teachable`."""

    @abc.abstractmethod
    def _vectors(self, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """What meets the rows of the table at every place, given the true tokens before it, (P·K, X)."""

    @abc.abstractmethod
    def _table(self) -> tuple[Tensor, Tensor | None]:
        """A row for each token, (V, X), whose product with a vector is its score, but for a bias, (V,)."""

    @abc.abstractmethod
    def _write(self, prepared_P: Tensor, uniform_NPK: Tensor, temperature: float) -> Tensor:
        """Tokens (N, P, K), one place after the other, each chosen by a uniform number in [0, 1)."""

    def _loss(self, states_PD: Tensor, target: Target, noise: Any) -> Tensor:
        """Mean cross-entropy of the chunk's tokens, each given all before it, in nats, (P,)."""
        return self.token_losses(states_PD, target.tokens_PK).mean(-1)

    def token_losses(self, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """See `Likelihood`."""
        table_VX, bias_V = self._table()
        losses_M = cross_entropy(self._vectors(states_PD, tokens_PK), table_VX, tokens_PK.flatten(), bias_V)
        return losses_M.view_as(tokens_PK)

    def taught_losses(self, states_PD: Tensor, tokens_PK: Tensor, teaching: Teaching) -> Tensor:
        """See `Teachable`."""
        vectors_MX, (table_VX, bias_V) = self._vectors(states_PD, tokens_PK), self._table()
        if bias_V is not None:  # One more column, which is multiplied with 1.
            vectors_MX = torch.cat([vectors_MX, torch.ones_like(vectors_MX[:, :1])], dim=-1)
            table_VX = torch.cat([table_VX, bias_V.unsqueeze(-1)], dim=-1)
        return distillation(vectors_MX, table_VX, tokens_PK.flatten(), teaching).view(tokens_PK.shape)

    def token_probabilities(
        self, states_PD: Tensor, tokens_PK: Tensor, temperature: float = 1.0
    ) -> TokenProbabilities:
        """See `Likelihood`.

        Raises:
            ValueError: If the temperature lies outside 0.01 to 1.
        """
        _check_for_probabilities(temperature)
        table_VX, bias_V = self._table()
        vectors_MX, bias_V = _tempered(self._vectors(states_PD, tokens_PK), bias_V, temperature)
        figures_3M = probabilities(vectors_MX, table_VX, tokens_PK.flatten(), bias_V)
        return TokenProbabilities(*figures_3M.unflatten(-1, tokens_PK.shape))

    def token_distribution(
        self, states_PD: Tensor, tokens_PK: Tensor, place: int, temperature: float = 1.0
    ) -> Tensor:
        """See `TokenDistributions`.

        Raises:
            ValueError: If the temperature lies outside 0.01 to 1.
        """
        _check_for_probabilities(temperature)
        vectors_PKX = self._vectors(states_PD, tokens_PK).unflatten(0, tokens_PK.shape)
        table_VX, bias_V = self._table()
        vectors_PX, bias_V = _tempered(vectors_PKX[:, place], bias_V, temperature)
        return torch.cat(list(token_distributions(vectors_PX, table_VX, bias_V)))

    def draw_chunks(
        self, prepared_P: Tensor, num_draws: int, randomness: Randomness = None, temperature: float = 1.0
    ) -> Tensor:
        """See `GenerativeHead`: each token's distribution is sharpened, as in a model of tokens.

        Below T = 0.01 it is the likeliest token.
        """
        self.check_temperature(temperature)
        size = self.config.chunk_size  # type: ignore[attr-defined]
        uniform_NPK = uniform(num_draws, prepared_P.shape[0], size, randomness, prepared_P.device)
        return self._write(prepared_P, uniform_NPK, temperature)


def choose_tokens(
    vectors_MX: Tensor, table_VX: Tensor, bias_V: Tensor | None, uniform_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The next token of each row, (M,), and a number that is finite where its scores are, (M,)."""
    if temperature < MIN_TEMPERATURE:
        return likeliest(vectors_MX, table_VX, bias_V)
    vectors_MX, bias_V = _tempered(vectors_MX, bias_V, temperature)
    return draw_tokens(vectors_MX, table_VX, uniform_M, bias_V)


def _tempered(vectors_MX: Tensor, bias_V: Tensor | None, temperature: float) -> tuple[Tensor, Tensor | None]:
    """Vectors and a bias that give scores divided by the temperature."""
    return vectors_MX / temperature, None if bias_V is None else bias_V / temperature


def _check_for_probabilities(temperature: float) -> None:
    """Raise ValueError where there are no probabilities."""
    if not MIN_TEMPERATURE <= temperature <= 1:
        raise ValueError(
            f"probabilities need a temperature from {MIN_TEMPERATURE:g} to 1, got {temperature:g}."
        )
