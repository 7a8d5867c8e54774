"""The parallel head: distributions of all K tokens of a chunk in one pass, drawn independently.

It is the cheapest head, and ignores how the tokens of a chunk depend on each other. Since chunk probabilities
are products, Brier-1 to Brier-K have a closed form: it can be trained on them, as a second stage after
cross-entropy (docs/heads.md).

Shapes: N draws, P positions, K tokens per chunk, M = N·P·K, D hidden size, E size of a token embedding,
R size of the vectors that give the logits: the rank r, or 2 r with classes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from calm.core.brier import brier_losses
from calm.models.heads.chunk_network import ChunkNetwork, multiply_adds
from calm.models.heads.contract import Target, require_finite
from calm.models.heads.fields import HeadFlops
from calm.models.heads.likelihood import LikelihoodHead
from calm.models.heads.token_classes import TokenClassesConfig, TokenClassesHead


@dataclass(kw_only=True)
class ParallelHeadConfig(TokenClassesConfig):
    """Fields of the parallel head.

    Args:
        head_type: Always "parallel".
        loss: "cross_entropy", or "brier": minus the mean of Brier-1 to Brier-K.

    For the other fields, see `TokenClassesConfig`.
    """

    head_type: str = "parallel"
    loss: Literal["cross_entropy", "brier"] = "cross_entropy"

    lowest_temperature: ClassVar[float] = 0.0
    training_fields: ClassVar[tuple[str, ...]] = ("loss",)

    @property
    def learns_cross_entropy(self) -> bool:
        """See `HeadConfig`."""
        return self.loss == "cross_entropy"

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """See `HeadConfig`; all draws share the network, but not the logits.

        The Brier loss needs the full distribution of each token, so classes save nothing there.
        """
        network = multiply_adds(
            hidden_size, self.extra_state_size, self.vector_size, self.chunk_size, self.num_blocks
        )
        per_logit = self.chunk_size * (self.rank + 1)
        flops = HeadFlops.of_forward_pass(sum(network), per_logit * self.num_logits, training_draws=1)
        if self.learns_cross_entropy:
            return flops
        return flops._replace(training_per_draw=6 * per_logit * self.num_all_logits)


class ParallelHead(TokenClassesHead, LikelihoodHead):
    """Draws all tokens at once; implements `Likelihood` and `TokenDistributions`.

    Its states are the backbone's, followed by its own embeddings of the previous chunk, (P, D + K·E).

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: ParallelHeadConfig

    def __init__(self, config: ParallelHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        sizes = (config.extra_state_size, config.vector_size, config.chunk_size, config.num_blocks)
        self.network = ChunkNetwork(hidden_size, *sizes, config.layer_norm_eps)
        self._add_output_layers(config.rank)

    def prepare(self, states_PD: Tensor) -> Tensor:
        """The vectors that give the logits, (P, K·R)."""
        vectors_PKR: Tensor = self.network(*self._split_states(states_PD))
        return vectors_PKR.flatten(1)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that touch embeddings or the vocabulary."""
        return [*self.network.boundary_layers(), *self._output_layers()]

    def _loss(self, states_PD: Tensor, target: Target, noise: Any) -> Tensor:
        """Mean cross-entropy of the chunk's tokens in nats, or minus the mean of Brier-1 to Brier-K, (P,)."""
        if self.config.learns_cross_entropy:
            return super()._loss(states_PD, target, noise)
        probabilities = self.token_probabilities(states_PD, target.tokens_PK)
        return brier_losses(probabilities.of_token_PK, probabilities.of_pair_PK).mean(-1)

    def _sample(self, prepared_P: Tensor, uniform_NPK: Tensor, temperature: float) -> Tensor:
        """Tokens (N, P, K), each sampled from a uniform number in [0, 1)."""
        vectors_PKR = prepared_P.unflatten(-1, (self.config.chunk_size, -1))
        vectors_MR = vectors_PKR.expand(*uniform_NPK.shape, -1).flatten(0, 2)
        tokens_M, check_M = self._vocabulary().choose(vectors_MR, uniform_NPK.flatten(), temperature)
        require_finite(check_M)
        return tokens_M.view_as(uniform_NPK)

    def _vectors_at(self, place: int, prepared_P: Tensor, tokens_PK: Tensor) -> Tensor:
        """See `LikelihoodHead`."""
        return prepared_P.unflatten(-1, (self.config.chunk_size, -1))[:, place]

    def _vectors(self, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """The vectors that give each token's logits, (P·K, R); they do not depend on the tokens."""
        vectors_PKR: Tensor = self.network(*self._split_states(states_PD))
        return vectors_PKR.flatten(0, 1)
