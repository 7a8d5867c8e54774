"""The sequential head: the tokens of a chunk one after another, each given those before it (docs/heads.md).

It is what every head that draws a chunk at once has to be measured against. A small network, the same for all
places, reads the tokens of the chunk so far under the eye of the hidden state and gives the law of the next:
exact likelihood, exact draws, K small steps for one of the backbone. Of what makes CALM continuous only the
interface is left: a latent is the codes of the tokens it drew. Source of the division of labour: the block
decoder and token decoder of the Block Transformer (Ho et al., arXiv 2406.02657).

Shapes: N draws, P positions, K tokens per chunk, D hidden size, Z latent size, V vocabulary, E size of a
token's embedding, r rank, S blocks.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness, uniform
from calm.models.blocks import PartedLinear, ZeroLinear
from calm.models.heads.adaln import RecomputedBlock
from calm.models.heads.base import (
    LOWEST_OF_LAWS,
    CodeHead,
    CodeHeadConfig,
    HeadWork,
    TokenChances,
    check_counts,
)
from calm.models.heads.scores import cross_entropy, laws, likeliest, probabilities


@dataclass(kw_only=True)
class SequentialHeadConfig(CodeHeadConfig):
    """Fields of the sequential head.

    Args:
        head_type: Always "sequential".
        num_blocks: Residual blocks.
        token_size: Size of the embedding of a token of the chunk.
        layer_norm_eps: Epsilon of the norms.

    The others are those of `CodeHeadConfig`.
    """

    head_type: str = "sequential"
    num_blocks: int = 2
    token_size: int = 64
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_blocks", "token_size")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be above 0, got {self.layer_norm_eps}.")

    @property
    def own_size(self) -> int:
        """See `HeadConfig`: embeddings of the K tokens of a chunk."""
        return self.chunk_size * self.token_size

    def work(self, hidden_size: int, latent_size: int) -> HeadWork:
        """See `HeadConfig`; there is one draw in training: the true chunk, all of its tokens at once."""
        square, blocks = hidden_size * hidden_size, self.num_blocks
        shared = square + 3 * blocks * square + hidden_size * self.chunk_size * self.rank
        of_token = (self.chunk_size * self.token_size + 2 * blocks * hidden_size + self.rank) * hidden_size
        per_draw = self.chunk_size * (of_token + self.vocab_size * (self.rank + 1))
        return HeadWork(
            shared=shared,
            per_draw=per_draw,
            training_shared=3 * shared,
            training_per_draw=3 * per_draw,
            training_draws=1,
        )


class SequentialHead(CodeHead):
    """Sampler of one token after another.

    Before each place it reads the last K tokens, those of the chunk before included. So its states are those
    of the backbone with its own embeddings of that chunk behind them, (P, D + K·E).

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: SequentialHeadConfig
    has_likelihood: ClassVar[bool] = True
    lowest_temperature: ClassVar[float] = 0.0

    def __init__(self, config: SequentialHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        size, eps = config.chunk_size, config.layer_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, config.token_size)
        self.embed_places = nn.Embedding(size, hidden_size)
        self.condition_in = nn.Linear(hidden_size, hidden_size)
        self.inp = nn.Linear(size * config.token_size, hidden_size)
        self.blocks = nn.ModuleList(RecomputedBlock(hidden_size, eps) for _ in range(config.num_blocks))
        self.out_norm = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=False)
        self.out = ZeroLinear(hidden_size, config.rank)
        self.direct = ZeroLinear(hidden_size, size * config.rank)
        self.scores = PartedLinear(config.rank, config.vocab_size)

    def read_chunks(self, chunks_BCK: Tensor) -> Tensor:
        """See `GenerativeHead`: the embeddings of the chunk's tokens in a row."""
        return self.embed_tokens(chunks_BCK).flatten(-2)

    def loss(
        self,
        hidden_PD: Tensor,
        posterior_PZ: DiagonalGaussian,
        generator: torch.Generator | None = None,
        noise: Any = None,
        tokens_PK: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the chunk's tokens, each given all before it, in nats, shape (P,)."""
        if tokens_PK is None:
            raise ValueError("the loss of a sequential head takes the tokens of the chunks, tokens_PK.")
        return self.token_losses(hidden_PD, tokens_PK).mean(-1)

    def token_losses(self, hidden_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """See `GenerativeHead`."""
        vectors_MX = self._vectors(hidden_PD, tokens_PK)
        return cross_entropy(vectors_MX, self._table(), tokens_PK.flatten()).view_as(tokens_PK)

    def token_probabilities(
        self, hidden_PD: Tensor, tokens_PK: Tensor, temperature: float = 1.0
    ) -> TokenChances:
        """See `GenerativeHead`."""
        self.check_temperature(temperature, LOWEST_OF_LAWS)
        vectors_MX = self._vectors(hidden_PD, tokens_PK) / temperature
        figures_3M = probabilities(vectors_MX, self._table(), tokens_PK.flatten())
        return TokenChances(*figures_3M.unflatten(-1, tokens_PK.shape))

    def prepare(self, hidden_PD: Tensor) -> Tensor:
        """What all tokens and draws of a position share, (P, 3·D·S + K·r + K·E)."""
        state_PD, before_PKE = self._parts(hidden_PD)
        condition_PD = F.silu(self.condition_in(state_PD))
        modulations = [block.modulation(condition_PD) for block in self.blocks]  # type: ignore[operator]
        return torch.cat([*modulations, self.direct(state_PD), before_PKE.flatten(-2)], dim=-1)

    def draw(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """See `GenerativeHead`; recorded noise is uniform in [0, 1), of shape (N, P, K)."""
        return self._draw(prepared_P, num_draws, randomness, noise, 1.0)

    def draw_at(
        self, temperature: float, prepared_P: Tensor, num_draws: int, randomness: Randomness = None
    ) -> Tensor:
        """See `GenerativeHead`: each token's law is sharpened, as in a model of tokens.

        Below T = 0.01 it is the likeliest token, with or without noise.
        """
        self.check_temperature(temperature)
        return self._draw(prepared_P, num_draws, randomness, None, temperature)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that meet embeddings or the vocabulary."""
        return [self.inp, self.out, self.direct, self.scores]

    def _draw(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness,
        noise: Tensor | None,
        temperature: float,
    ) -> Tensor:
        config, size = self.config, self.config.chunk_size
        if noise is None:
            noise = uniform(num_draws, len(prepared_P), size, randomness, prepared_P.device)
        widths = [3 * self.hidden_size] * config.num_blocks + [size * config.rank, config.own_size]
        *modulations, direct_PX, before_PX = prepared_P.split(widths, dim=-1)
        direct_PKR = direct_PX.unflatten(-1, (size, -1))
        known = list(before_PX.unflatten(-1, (size, -1)).expand(len(noise), -1, -1, -1).unbind(-2))
        table_VX, tokens, damage_NP = self._table(), [], torch.zeros_like(noise[..., 0])
        for place, uniform_NP in enumerate(noise.unbind(-1)):
            x_NPD = self.inp(torch.cat(known[-size:], dim=-1)) + self.embed_places.weight[place]
            for block, modulation in zip(self.blocks, modulations, strict=True):
                x_NPD = block.modulated(x_NPD, modulation)  # type: ignore[operator]
            vectors_NPR = self.out(self.out_norm(x_NPD)) + direct_PKR[:, place]
            vectors_MX = _with_one(vectors_NPR.flatten(0, 1))
            if temperature < LOWEST_OF_LAWS:
                tokens_M, sums_M = likeliest(vectors_MX, table_VX)
            else:
                tokens_M, sums_M = _choose(vectors_MX / temperature, table_VX, uniform_NP.flatten())
            tokens.append(tokens_M.view_as(uniform_NP))
            damage_NP = damage_NP + 0 * sums_M.view_as(uniform_NP)
            known.append(self.embed_tokens(tokens[-1]))
        codes_VC = self._codes[0].weight.to(prepared_P.device)  # It may be a copy without the autoencoder.
        codes_NPZ = F.embedding(torch.stack(tokens, dim=-1), codes_VC).flatten(-2)
        # Tokens are always tokens: that a law was none, because weights are damaged, must show in the latent.
        return codes_NPZ + damage_NP.unsqueeze(-1).to(codes_NPZ.dtype)

    def _vectors(self, hidden_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """What meets the table at every place, given the true tokens before it, (P·K, r + 1)."""
        state_PD, before_PKE = self._parts(hidden_PD)
        size = self.config.chunk_size
        known_PTE = torch.cat([before_PKE, self.embed_tokens(tokens_PK[:, :-1])], dim=1)
        windows_PKW = known_PTE.unfold(1, size, 1).transpose(-1, -2).flatten(-2)
        x_PKD = self.inp(windows_PKW) + self.embed_places.weight
        condition_P1D = F.silu(self.condition_in(state_PD)).unsqueeze(1)
        for block in self.blocks:
            x_PKD = block(x_PKD, condition_P1D)
        vectors_PKR = self.out(self.out_norm(x_PKD)) + self.direct(state_PD).unflatten(-1, (size, -1))
        return _with_one(vectors_PKR.flatten(0, 1))

    def _parts(self, hidden_PD: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's state, (P, D), and the embeddings of the chunk before, (P, K, E)."""
        state_PD, before_PX = hidden_PD.split([self.hidden_size, self.config.own_size], dim=-1)
        return state_PD, before_PX.unflatten(-1, (self.config.chunk_size, -1))

    def _table(self) -> Tensor:
        """A row for each token, (V, r + 1): its vector and bias."""
        return torch.cat([self.scores.weight, self.scores.bias.unsqueeze(-1)], dim=-1)


def _with_one(vectors_MR: Tensor) -> Tensor:
    return torch.cat([vectors_MR, torch.ones_like(vectors_MR[:, :1])], dim=-1)


def _choose(vectors_MX: Tensor, table_VX: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
    """A token from each row's law: where the law's running sum first exceeds the uniform number, (M,).

    And the last of these sums, (M,): 1 but for rounding, and not finite where the scores are not.
    """
    chosen, totals, first = [], [], 0
    for law_MV in laws(vectors_MX, table_VX):
        sums_MV = law_MV.cumsum(-1)
        # Times the last sum, which is not quite 1: no number lies beyond it.
        points_M1 = uniform_M[first : first + len(law_MV), None].to(sums_MV.dtype) * sums_MV[:, -1:]
        chosen.append(torch.searchsorted(sums_MV, points_M1, right=True).squeeze(-1))
        totals.append(sums_MV[:, -1])
        first += len(law_MV)
    return torch.cat(chosen).clamp_max(len(table_VX) - 1), torch.cat(totals)
