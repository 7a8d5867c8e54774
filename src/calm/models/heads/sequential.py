"""The sequential head: the tokens of a chunk one after another, each given those before it (docs/heads.md).

It is the baseline for every head that draws a chunk at once. A small network, the same for all tokens of a
chunk, reads the last K tokens and the hidden state, and predicts the distribution of the next token: exact
likelihood, exact draws, K small steps per backbone step. It predicts tokens, not latents; what it keeps of
CALM is the backbone over chunks. The split into a backbone over blocks and a token decoder inside them is
that of the Block Transformer (Ho et al., arXiv 2406.02657).

Shapes: N draws, P positions, M = N·P, K tokens per chunk, T = 2 K - 1 tokens that the K windows cover,
D hidden size, E size of a token embedding, W = K·E size of a window, S blocks, r rank, R size of the vectors
that give the logits: r, or 2 r with classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.models.blocks import RecomputedBlock, ZeroLinear
from calm.models.heads.contract import require_finite
from calm.models.heads.fields import HeadFlops
from calm.models.heads.likelihood import LikelihoodHead
from calm.models.heads.token_classes import TokenClassesConfig, TokenClassesHead


@dataclass(kw_only=True)
class SequentialHeadConfig(TokenClassesConfig):
    """Fields of the sequential head.

    Args:
        head_type: Always "sequential".

    For the other fields, see `TokenClassesConfig`.
    """

    head_type: str = "sequential"

    lowest_temperature: ClassVar[float] = 0.0

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """See `HeadConfig`; training has one draw: the true chunk, all of its tokens at once.

        With classes, draws are counted at temperature 1; other temperatures need the logits of all tokens.
        """
        square, blocks, size = hidden_size * hidden_size, self.num_blocks, self.vector_size
        shared = square + 3 * blocks * square + hidden_size * self.chunk_size * size
        per_token = (self.chunk_size * self.token_size + 2 * blocks * hidden_size + size) * hidden_size
        per_draw = self.chunk_size * (per_token + self.num_logits * (self.rank + 1))
        return HeadFlops.of_forward_pass(shared, per_draw, training_draws=1)


class _Shared(NamedTuple):
    """What all tokens of a chunk share.

    Args:
        modulations: Shift, scale and gate of each block, (P, 3·D).
        direct_PKR: Added to each token's vector.
        previous_PKE: The head's embeddings of the previous chunk.
    """

    modulations: Sequence[Tensor]
    direct_PKR: Tensor
    previous_PKE: Tensor


class SequentialHead(TokenClassesHead, LikelihoodHead):
    """Draws one token after another; implements `Likelihood` and `TokenDistributions`.

    For each token it reads the K tokens before it, some of them in the previous chunk. So its states are the
    backbone's, followed by its own embeddings of that chunk, (P, D + K·E).

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: SequentialHeadConfig

    def __init__(self, config: SequentialHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        size, eps = config.chunk_size, config.layer_norm_eps
        self.embed_places = nn.Embedding(size, hidden_size)
        self.condition_in = nn.Linear(hidden_size, hidden_size)
        self.inp = nn.Linear(size * config.token_size, hidden_size)
        self.blocks = nn.ModuleList(RecomputedBlock(hidden_size, eps) for _ in range(config.num_blocks))
        self.out_norm = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=False)
        self.out = ZeroLinear(hidden_size, config.vector_size)
        self.direct = ZeroLinear(hidden_size, size * config.vector_size)
        self._add_output_layers(config.rank)

    def prepare(self, states_PD: Tensor) -> Tensor:
        """What all tokens and draws of a position share, (P, 3·D·S + K·R + K·E)."""
        state_PD, previous_PW = self._split_states(states_PD)
        condition_PD = F.silu(self.condition_in(state_PD))
        modulations = [block.modulation(condition_PD) for block in self.blocks]  # type: ignore[operator]
        return torch.cat([*modulations, self.direct(state_PD), previous_PW], dim=-1)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that touch embeddings or the vocabulary."""
        return [self.inp, self.out, self.direct, *self._output_layers()]

    def _sample(self, prepared_P: Tensor, uniform_NPK: Tensor, temperature: float) -> Tensor:
        """Tokens (N, P, K), sampled one after another, each from a uniform number in [0, 1)."""
        num_draws, shared = uniform_NPK.shape[0], self._shared(prepared_P)
        embedded = list(shared.previous_PKE.expand(num_draws, -1, -1, -1).unbind(-2))
        vocabulary, tokens = self._vocabulary(), list[Tensor]()
        checks_M = torch.zeros_like(uniform_NPK[..., 0]).flatten()
        for k, uniform_NP in enumerate(uniform_NPK.unbind(-1)):
            vectors_MR = self._vectors_after(embedded, k, shared).flatten(0, 1)
            tokens_M, check_M = vocabulary.choose(vectors_MR, uniform_NP.flatten(), temperature)
            tokens.append(tokens_M.view_as(uniform_NP))
            checks_M = checks_M + check_M
            embedded.append(self.embed_tokens(tokens[-1]))
        require_finite(checks_M)  # Once for all tokens: it waits for the device.
        return torch.stack(tokens, dim=-1)

    def _vectors_at(self, place: int, prepared_P: Tensor, tokens_PK: Tensor) -> Tensor:
        """See `LikelihoodHead`."""
        shared = self._shared(prepared_P)
        embedded_PKE = torch.cat([shared.previous_PKE, self.embed_tokens(tokens_PK[:, :place])], dim=1)
        return self._vectors_after(embedded_PKE.unbind(1), place, shared)

    def _shared(self, prepared_P: Tensor) -> _Shared:
        """The parts of the output of `prepare`."""
        config, size = self.config, self.config.chunk_size
        widths = [3 * self.hidden_size] * config.num_blocks
        widths += [size * config.vector_size, config.extra_state_size]
        *modulations, direct_PX, previous_PW = prepared_P.split(widths, dim=-1)
        return _Shared(
            modulations, direct_PX.unflatten(-1, (size, -1)), previous_PW.unflatten(-1, (size, -1))
        )

    def _vectors_after(self, embedded: Sequence[Tensor], place: int, shared: _Shared) -> Tensor:
        """The vectors that give a token's logits, (..., P, R).

        Args:
            embedded: Embeddings (..., P, E) of the tokens before it, at least K.
            place: Its position inside the chunk, from 0.
            shared: What all tokens of the chunk share.
        """
        window = torch.cat(embedded[-self.config.chunk_size :], dim=-1)  # type: ignore[arg-type]
        x = self.inp(window) + self.embed_places.weight[place]
        for block, modulation in zip(self.blocks, shared.modulations, strict=True):
            x = block.forward_modulated(x, modulation)  # type: ignore[operator]
        return self.out(self.out_norm(x)) + shared.direct_PKR[:, place]

    def _vectors(self, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """The vectors that give each token's logits, given the true tokens before it, (P·K, R)."""
        state_PD, previous_PW = self._split_states(states_PD)
        size = self.config.chunk_size
        previous_PKE = previous_PW.unflatten(-1, (size, -1))
        embedded_PTE = torch.cat([previous_PKE, self.embed_tokens(tokens_PK[:, :-1])], dim=1)
        windows_PKW = embedded_PTE.unfold(1, size, 1).transpose(-1, -2).flatten(-2)
        x_PKD = self.inp(windows_PKW) + self.embed_places.weight
        condition_P1D = F.silu(self.condition_in(state_PD)).unsqueeze(1)
        for block in self.blocks:
            x_PKD = block(x_PKD, condition_P1D)
        vectors_PKR = self.out(self.out_norm(x_PKD)) + self.direct(state_PD).unflatten(-1, (size, -1))
        return vectors_PKR.flatten(0, 1)
