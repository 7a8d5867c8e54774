"""The coarse-to-fine head: the classes of all tokens of a chunk, then all tokens at once.

Tokens are grouped in classes (`calm.core.classes`). A network reads the state and the previous chunk once,
and outputs a vector per token. From these the classes are drawn one after another: the contribution of the
classes drawn so far is looked up in a table, so a step is a sum and the logits of C classes. A second network
then reads all K classes, and each token is drawn from its class, all at the same time. So a chunk takes two
network calls whatever K is, and -log P(chunk) is exact; the distribution of a token given only those before
it is not available.

Shapes: N draws, P positions, K tokens per chunk, D hidden size, E size of a token embedding, F size of a
class embedding, H size of the vector before the class logits, R rank, C classes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.core.cross_entropy import cross_entropy
from calm.core.random import Randomness, uniform
from calm.models.heads.chunk_network import ChunkNetwork, multiply_adds
from calm.models.heads.contract import Target, require_finite
from calm.models.heads.fields import HeadFlops, check_counts
from calm.models.heads.token_classes import TokenClassesConfig, TokenClassesHead
from calm.models.heads.vocabulary import draw_from_logits


@dataclass(kw_only=True)
class CoarseToFineHeadConfig(TokenClassesConfig):
    """Fields of the coarse-to-fine head.

    Args:
        head_type: Always "coarse_to_fine".
        num_classes: Number of token classes, at least 2.
        num_fine_blocks: Residual blocks of the second network.
        class_embedding_size: Size of a class embedding.
        class_rank: Size H of the vector before the class logits.

    For the other fields, see `TokenClassesConfig`; `num_blocks` is for the first network.
    """

    head_type: str = "coarse_to_fine"
    num_classes: int = 64
    num_fine_blocks: int = 1
    class_embedding_size: int = 32
    class_rank: int = 64

    lowest_temperature: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_fine_blocks", "class_embedding_size", "class_rank")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}.")

    @property
    def fine_size(self) -> int:
        """Input size of the second network: the previous chunk, and all classes."""
        return self.chunk_size * (self.token_size + self.class_embedding_size)

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """See `HeadConfig`; training has one draw: the true chunk, all of its tokens at once."""
        size = self.chunk_size
        coarse = multiply_adds(hidden_size, self.extra_state_size, self.class_rank, size, self.num_blocks)
        shared, fine = multiply_adds(hidden_size, self.fine_size, self.rank, size, self.num_fine_blocks)
        class_logits = self.num_filled_classes * (self.class_rank + 1)
        per_draw = fine + size * (class_logits + self.class_size * (self.rank + 1))
        return HeadFlops.of_forward_pass(sum(coarse) + shared, per_draw, training_draws=1)


class CoarseToFineHead(TokenClassesHead):
    """Draws the classes of a chunk, then its tokens.

    Its states are the backbone's, followed by its own embeddings of the previous chunk, (P, D + K·E).

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: CoarseToFineHeadConfig

    def __init__(self, config: CoarseToFineHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        size, eps = config.chunk_size, config.layer_norm_eps
        self.embed_classes = nn.Embedding(config.num_filled_classes, config.class_embedding_size)
        # One row per distance and class; see `_contribution`.
        self.embed_earlier = nn.Embedding(max(1, size - 1) * config.num_filled_classes, config.class_rank)
        self.coarse = ChunkNetwork(
            hidden_size, config.extra_state_size, config.class_rank, size, config.num_blocks, eps
        )
        self.fine = ChunkNetwork(
            hidden_size, config.fine_size, config.rank, size, config.num_fine_blocks, eps
        )
        self._add_output_layers(config.class_rank)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that touch embeddings or the vocabulary."""
        return [*self.coarse.boundary_layers(), *self.fine.boundary_layers(), *self._output_layers()]

    def prepare(self, states_PD: Tensor) -> Tensor:
        """The first network's vectors, the second's shared part, and the previous chunk, concatenated."""
        state_PD, previous_PX = self._split_states(states_PD)
        vectors_PKH = self.coarse(state_PD, previous_PX)
        return torch.cat([vectors_PKH.flatten(1), self.fine.prepare(state_PD), previous_PX], dim=-1)

    def draw_chunks(
        self, prepared_P: Tensor, num_draws: int, randomness: Randomness = None, temperature: float = 1.0
    ) -> Tensor:
        """See `GenerativeHead`."""
        self.check_temperature(temperature)
        config, size = self.config, self.config.chunk_size
        coarse_size, previous_size = size * config.class_rank, config.extra_state_size
        shared_size = prepared_P.shape[1] - coarse_size - previous_size
        vectors_PX, fine_PX, previous_PX = prepared_P.split([coarse_size, shared_size, previous_size], dim=-1)
        uniform_NPX = uniform(num_draws, prepared_P.shape[0], 2 * size, randomness, prepared_P.device)
        class_uniform_NPK, token_uniform_NPK = uniform_NPX.chunk(2, dim=-1)
        classes_NPK, class_checks = self._draw_classes(
            vectors_PX.unflatten(-1, (size, -1)), class_uniform_NPK
        )
        vectors_NPKR = self.fine.forward_prepared(fine_PX, self._fine_inputs(previous_PX, classes_NPK))
        tokens_M, token_checks = self._classed_tokens().draw(
            classes_NPK.flatten(), vectors_NPKR.flatten(0, 2), token_uniform_NPK.flatten()
        )
        require_finite(class_checks)
        require_finite(token_checks)
        return tokens_M.view_as(classes_NPK)

    def _draw_classes(self, vectors_PKH: Tensor, uniform_NPK: Tensor) -> tuple[Tensor, Tensor]:
        """Classes of all tokens, (N, P, K), each given those before it; and numbers for `require_finite`."""
        classes, checks = list[Tensor](), list[Tensor]()
        for k, uniform_NP in enumerate(uniform_NPK.unbind(-1)):
            vectors_NPH = vectors_PKH[:, k].expand(*uniform_NP.shape, -1)
            for distance, earlier_NP in enumerate(reversed(classes)):
                vectors_NPH = vectors_NPH + self._contribution(earlier_NP, distance)
            logits_NPC = F.linear(F.silu(vectors_NPH), self.class_scores.weight, self.class_scores.bias)
            class_M, _, check_M = draw_from_logits(logits_NPC.float().flatten(0, 1), uniform_NP.flatten())
            classes.append(class_M.view_as(uniform_NP))
            checks.append(check_M)
        return torch.stack(classes, dim=-1), torch.cat(checks)

    def _loss(self, states_PD: Tensor, target: Target, noise: Any) -> Tensor:
        """-log P(chunk) / K in nats, (P,): of the classes, each given those before it, and of the tokens."""
        tokens, size = self._classed_tokens(), self.config.chunk_size
        state_PD, previous_PX = self._split_states(states_PD)
        slots_PK = tokens.slots(target.tokens_PK)
        classes_PK = slots_PK // tokens.class_size
        vectors = list(self.coarse(state_PD, previous_PX).unbind(1))
        for k in range(1, size):
            for distance in range(k):
                vectors[k] = vectors[k] + self._contribution(classes_PK[:, k - 1 - distance], distance)
        class_losses_M = cross_entropy(
            F.silu(torch.stack(vectors, dim=1)).flatten(0, 1),
            self.class_scores.weight,
            classes_PK.flatten(),
            self.class_scores.bias,
        )
        vectors_PKR = self.fine(state_PD, self._fine_inputs(previous_PX, classes_PK))
        token_losses_M = tokens.losses(vectors_PKR.flatten(0, 1), slots_PK.flatten())
        return (class_losses_M + token_losses_M).view_as(slots_PK).mean(-1)

    def _contribution(self, classes: Tensor, distance: int) -> Tensor:
        """What classes add to the vector of a later token, with `distance` tokens in between, (..., H)."""
        return self.embed_earlier(distance * self.config.num_filled_classes + classes)

    def _fine_inputs(self, previous_PX: Tensor, classes: Tensor) -> Tensor:
        """The previous chunk and all classes, (..., P, K·(E + F))."""
        previous = previous_PX.expand(*classes.shape[:-1], -1)
        return torch.cat([previous, self.embed_classes(classes).flatten(-2)], dim=-1)
