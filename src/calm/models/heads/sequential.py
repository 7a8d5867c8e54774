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

from dataclasses import dataclass
from typing import ClassVar

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
        config, size, num_draws = self.config, self.config.chunk_size, uniform_NPK.shape[0]
        widths = [3 * self.hidden_size] * config.num_blocks
        widths += [size * config.vector_size, config.extra_state_size]
        *modulations, direct_PX, previous_PW = prepared_P.split(widths, dim=-1)
        direct_PKR = direct_PX.unflatten(-1, (size, -1))
        previous_PKE = previous_PW.unflatten(-1, (size, -1))
        embedded = list(previous_PKE.expand(num_draws, -1, -1, -1).unbind(-2))
        vocabulary, tokens = self._vocabulary(), list[Tensor]()
        checks_M = torch.zeros_like(uniform_NPK[..., 0]).flatten()
        for k, uniform_NP in enumerate(uniform_NPK.unbind(-1)):
            x_NPD = self.inp(torch.cat(embedded[-size:], dim=-1)) + self.embed_places.weight[k]
            for block, modulation in zip(self.blocks, modulations, strict=True):
                x_NPD = block.forward_modulated(x_NPD, modulation)  # type: ignore[operator]
            vectors_NPR = self.out(self.out_norm(x_NPD)) + direct_PKR[:, k]
            vectors_MR = vectors_NPR.flatten(0, 1)
            tokens_M, check_M = vocabulary.choose(vectors_MR, uniform_NP.flatten(), temperature)
            tokens.append(tokens_M.view_as(uniform_NP))
            checks_M = checks_M + check_M
            embedded.append(self.embed_tokens(tokens[-1]))
        require_finite(checks_M)  # Once for all tokens: it waits for the device.
        return torch.stack(tokens, dim=-1)

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
