"""Base class of the heads with token probabilities: likelihoods, and sampling tokens from uniform numbers.

Shapes: N draws, P positions, K tokens per chunk, M = P·K, D state size, V vocabulary, X size of the vectors
that give the logits.
"""

import abc
from typing import Any

import torch
from torch import Tensor

from calm.core.distillation import SoftTargets
from calm.core.random import Randomness, uniform
from calm.models.heads.contract import (
    MIN_TEMPERATURE,
    GenerativeHead,
    Target,
    TokenDistribution,
    TokenProbabilities,
)
from calm.models.heads.vocabulary import Vocabulary


class LikelihoodHead(GenerativeHead):
    """Knows every token's distribution; implements `Likelihood`, `TokenDistributions` and `Distillable`."""

    @abc.abstractmethod
    def _vectors(self, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """The vectors that give each token's logits, given the true tokens before it, (P·K, X)."""

    @abc.abstractmethod
    def _vectors_at(self, place: int, prepared_P: Tensor, tokens_PK: Tensor) -> Tensor:
        """The same vectors for the token at one position of each chunk, from the output of `prepare`, (P, X).

        Tokens from that position on are ignored.
        """

    @abc.abstractmethod
    def _vocabulary(self) -> Vocabulary:
        """The vocabulary that turns these vectors into distributions."""

    @abc.abstractmethod
    def _sample(self, prepared_P: Tensor, uniform_NPK: Tensor, temperature: float) -> Tensor:
        """Tokens (N, P, K), each sampled from a uniform number in [0, 1)."""

    def _loss(self, states_PD: Tensor, target: Target, noise: Any) -> Tensor:
        """Mean cross-entropy of the chunk's tokens, each given all tokens before it, in nats, (P,)."""
        return self.token_losses(states_PD, target.tokens_PK).mean(-1)

    def token_losses(self, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """See `Likelihood`."""
        losses_M = self._vocabulary().losses(self._vectors(states_PD, tokens_PK), tokens_PK.flatten())
        return losses_M.view_as(tokens_PK)

    def distillation_losses(self, states_PD: Tensor, tokens_PK: Tensor, soft_targets: SoftTargets) -> Tensor:
        """See `Distillable`."""
        vectors_MX = self._vectors(states_PD, tokens_PK)
        losses_M = self._vocabulary().distillation_losses(vectors_MX, tokens_PK.flatten(), soft_targets)
        return losses_M.view(tokens_PK.shape)

    def token_probabilities(
        self, states_PD: Tensor, tokens_PK: Tensor, temperature: float = 1.0
    ) -> TokenProbabilities:
        """See `Likelihood`.

        Raises:
            ValueError: If the temperature lies outside 0.01 to 1.
        """
        _check_for_probabilities(temperature)
        vectors_MX = self._vectors(states_PD, tokens_PK)
        statistics_3M = self._vocabulary().probabilities(vectors_MX, tokens_PK.flatten(), temperature)
        return TokenProbabilities(*statistics_3M.unflatten(-1, tokens_PK.shape))

    def token_distribution(
        self, prepared_P: Tensor, tokens_PK: Tensor, place: int, temperature: float = 1.0
    ) -> Tensor:
        """Distribution of the token at one position of each chunk, given the tokens before it, (P, V).

        Args:
            prepared_P: Output of `prepare` for the states of the preceding chunks, or some of its rows.
            tokens_PK: The chunks; tokens from that position on are ignored.
            place: Position inside the chunk, from 0.
            temperature: As in `Likelihood.token_probabilities`.

        Raises:
            ValueError: If the temperature lies outside 0.01 to 1.
        """
        _check_for_probabilities(temperature)
        vectors_PX = self._vectors_at(place, prepared_P, tokens_PK)
        return torch.cat(list(self._vocabulary().distributions(vectors_PX, temperature)))

    def draft_distribution(
        self, prepared_P: Tensor, tokens_PK: Tensor, place: int, temperature: float = 1.0
    ) -> TokenDistribution:
        """See `TokenDistributions`.

        Raises:
            ValueError: If the temperature lies outside 0.01 to 1.
        """
        _check_for_probabilities(temperature)
        vectors_PX = self._vectors_at(place, prepared_P, tokens_PK)
        return self._vocabulary().draft_distribution(vectors_PX, temperature)

    def draw_chunks(
        self, prepared_P: Tensor, num_draws: int, randomness: Randomness = None, temperature: float = 1.0
    ) -> Tensor:
        """See `GenerativeHead`: each token's distribution is sharpened, as in a token-level model.

        Below T = 0.01, decoding is greedy.
        """
        self.check_temperature(temperature)
        size = self.config.chunk_size  # type: ignore[attr-defined]
        uniform_NPK = uniform(num_draws, prepared_P.shape[0], size, randomness, prepared_P.device)
        return self._sample(prepared_P, uniform_NPK, temperature)


def _check_for_probabilities(temperature: float) -> None:
    """Raise ValueError at a temperature at which probabilities are not computed."""
    if not MIN_TEMPERATURE <= temperature <= 1:
        raise ValueError(
            f"probabilities need a temperature from {MIN_TEMPERATURE:g} to 1, got {temperature:g}."
        )
