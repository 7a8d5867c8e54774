"""The decoder head: a token-level model inside the chunk, made of the last layers of a Llama.

A window of K positions starts with the last token of the previous chunk, and position p predicts token p of
the next chunk. The first layers read the tokens of the window. Then position 0 continues from the backbone's
state s, and position p > 0 from the state of token p - 1 after the first layers, plus a map of the backbone's
update at position 0: s minus the state after the first layers there. The map is initialized to the identity.
The last layers, a norm and the logits follow. Attention in both groups of layers is causal inside the window
(`calm.models.token_layers`).

So a token-level Transformer can be split into a CALM (docs/uptraining.md). A token decoder inside blocks is
that of the Block Transformer (Ho et al., arXiv 2406.02657).

Shapes: N draws, P positions, M = N·P, K tokens per chunk, D hidden size.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calm.models.blocks import SlicedLinear, ZeroLinear
from calm.models.heads.contract import require_finite
from calm.models.heads.fields import HeadConfig, HeadFlops, check_counts
from calm.models.heads.likelihood import LikelihoodHead
from calm.models.heads.vocabulary import OneSoftmax
from calm.models.token_layers import Memory, TokenLayers, multiply_adds_of_layer


@dataclass(kw_only=True)
class DecoderHeadConfig(HeadConfig):
    """Fields of the decoder head.

    Args:
        head_type: Always "decoder".
        first_layers: Layers that read tokens.
        last_layers: Layers between the backbone's state and the logits.
        has_tied_scores: Whether the output projection is tied to the token embeddings.
        sink: Whether each window starts with an attention sink.
        vocab_size: Size of the vocabulary; the model fills it in.
        chunk_size: Tokens per chunk; the model fills it in.
        layer_sizes: Arguments of `LlamaConfig` for the layers, the same as for the backbone; the model
            fills it in.
    """

    head_type: str = "decoder"
    first_layers: int = 1
    last_layers: int = 2
    has_tied_scores: bool = True
    sink: bool = True
    vocab_size: int = 1
    chunk_size: int = 1
    layer_sizes: dict[str, Any] = field(default_factory=dict)

    needs_codes: ClassVar[bool] = True
    lowest_temperature: ClassVar[float] = 0.0
    decodes_latents: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "vocab_size", "chunk_size")
        for name in ("first_layers", "last_layers"):
            if not 0 <= getattr(self, name) <= 10_000:
                raise ValueError(f"{name} must be from 0 to 10000, got {getattr(self, name)}.")

    @property
    def extra_state_size(self) -> int:
        """See `HeadConfig`: the embedding of a chunk's last token."""
        return self.as_llama().hidden_size

    def as_llama(self) -> LlamaConfig:
        """The layers' configuration."""
        return LlamaConfig(**self.layer_sizes)

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """See `HeadConfig`; training has one draw: the true chunk, all of its tokens at once."""
        llama, layers = self.as_llama(), self.first_layers + self.last_layers
        # Each position attends to the sink, the positions before it, and itself.
        first, *later = (
            layers * multiply_adds_of_layer(llama, self.sink + k + 1) for k in range(self.chunk_size)
        )
        shared = first + len(later) * hidden_size * hidden_size
        per_draw = sum(later) + self.chunk_size * self.vocab_size * hidden_size
        return HeadFlops.of_forward_pass(shared, per_draw, training_draws=1)


class DecoderHead(LikelihoodHead):
    """Draws one token after another; implements `Likelihood` and `TokenDistributions`.

    Its states are the backbone's, followed by the embedding of the chunk's last token, (P, 2·D).

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone D.
        latent_size: Dimensions of a latent Z.
    """

    config: DecoderHeadConfig
    shares_embeddings = True
    _backbone: tuple[nn.Module, ...] = ()

    def __init__(self, config: DecoderHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        llama = config.as_llama()
        self.first = TokenLayers(llama, config.first_layers, config.sink)
        self.last = TokenLayers(llama, config.last_layers, config.sink)
        self.norm = LlamaRMSNorm(hidden_size, eps=llama.rms_norm_eps)
        # The map of the backbone's update to each later position, minus the identity.
        later_size = (config.chunk_size - 1) * hidden_size
        self.inject = ZeroLinear(hidden_size, later_size, bias=False) if later_size else nn.Identity()
        self.scores = (
            None if config.has_tied_scores else SlicedLinear(hidden_size, config.vocab_size, bias=False)
        )

    def attach_backbone(self, backbone: nn.Module) -> None:
        """See `GenerativeHead`; the head shares its token embeddings."""
        self._backbone = (backbone,)  # The tuple keeps it from being registered as a submodule.

    def embed_chunks(self, chunks_BCK: Tensor) -> Tensor:
        """See `GenerativeHead`: the embedding of the chunk's last token."""
        return self.embed(chunks_BCK[..., -1])

    def boundary_layers(self) -> list[nn.Module]:
        """The output projection, unless it is tied to the embeddings."""
        return [] if self.scores is None else [self.scores]

    def prepare(self, states_PD: Tensor) -> Tensor:
        """What all draws of a position share: everything about the first token except sampling it.

        Returns:
            (P, D + (K - 1)·D + memory sizes): the vector that gives the first token's logits, what is added
            at each later position, and the keys and values of position 0 in the first and last layers.
        """
        state_PD, previous_PD = self._split_states(states_PD)
        x_PD, first_memory = self.first.step(previous_PD, 0, [])
        updates_PX = self._later_updates(state_PD - x_PD).flatten(1)
        x_PD, last_memory = self.last.step(state_PD, 0, [])
        memories = ((self.first, first_memory), (self.last, last_memory))
        packed = [layers.pack(memory) for layers, memory in memories if memory]
        return torch.cat([self.norm(x_PD), updates_PX, *packed], dim=-1)

    def _later_updates(self, update_PD: Tensor) -> Tensor:
        """What the backbone's update at position 0 adds at the positions after it, (P, K - 1, D)."""
        if self.config.chunk_size == 1:
            return update_PD.unsqueeze(1)[:, :0]
        injected_PKD = self.inject(update_PD).unflatten(-1, (self.config.chunk_size - 1, self.hidden_size))
        return update_PD.unsqueeze(1) + injected_PKD

    def _sample(self, prepared_P: Tensor, uniform_NPK: Tensor, temperature: float) -> Tensor:
        window = self._window(prepared_P.expand(uniform_NPK.shape[0], -1, -1).flatten(0, 1))
        vocabulary, tokens = self._vocabulary(), list[Tensor]()
        checks_M = torch.zeros_like(uniform_NPK[..., 0]).flatten()
        for k, uniform_NP in enumerate(uniform_NPK.unbind(-1)):
            vectors_MD = window.vectors_PD if k == 0 else window.advance(tokens[-1])
            tokens_M, check_M = vocabulary.choose(vectors_MD, uniform_NP.flatten(), temperature)
            tokens.append(tokens_M)
            checks_M = checks_M + check_M
        require_finite(checks_M)  # Once for all tokens: it waits for the device.
        return torch.stack(tokens, dim=-1).view_as(uniform_NPK)

    def _window(self, prepared_P: Tensor) -> "_Window":
        """The start of the windows of some positions, from the output of `prepare`."""
        size, width = self.config.chunk_size, self.hidden_size
        widths = [width, (size - 1) * width, self.first.memory_size, self.last.memory_size]
        vectors_PD, updates_PX, first_PX, last_PX = prepared_P.split(widths, dim=-1)
        updates_PKD = updates_PX.unflatten(-1, (size - 1, width))
        return _Window(self, vectors_PD, updates_PKD, self.first.unpack(first_PX), self.last.unpack(last_PX))

    def _vectors_at(self, place: int, prepared_P: Tensor, tokens_PK: Tensor) -> Tensor:
        """See `LikelihoodHead`."""
        window = self._window(prepared_P)
        for tokens_P in tokens_PK[:, :place].unbind(1):
            window.advance(tokens_P)
        return window.vectors_PD

    def _vectors(self, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        state_PD, previous_PD = self._split_states(states_PD)
        window_PKD = torch.cat([previous_PD.unsqueeze(1), self.embed(tokens_PK[:, :-1])], dim=1)
        x_PKD = self.first(window_PKD)
        later_PKD = x_PKD[:, 1:] + self._later_updates(state_PD - x_PKD[:, 0])
        x_PKD = self.last(torch.cat([state_PD.unsqueeze(1), later_PKD], dim=1))
        return self.norm(x_PKD).flatten(0, 1)

    def _split_states(self, states_PD: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's state, and the embedding of the last token before the chunk, (P, D) each."""
        state_PD, previous_PD = states_PD.split([self.hidden_size, self.hidden_size], dim=-1)
        return state_PD, previous_PD

    def _vocabulary(self) -> OneSoftmax:
        table = self._backbone[0].embed_tokens if self.scores is None else self.scores
        return OneSoftmax(table.weight)  # type: ignore[union-attr,arg-type]

    def embed(self, tokens: Tensor) -> Tensor:
        """The backbone's embeddings of tokens, (..., D)."""
        return self._backbone[0].embed_tokens(tokens)  # type: ignore[operator]


@dataclass
class _Window:
    """The windows of some positions, read token by token.

    Args:
        head: The head.
        vectors_PD: The vectors that give the logits of the next token.
        updates_PKD: What is added at each of the K - 1 positions after the first.
        first_memory: Keys and values in the first layers so far.
        last_memory: Keys and values in the last layers so far.
    """

    head: DecoderHead
    vectors_PD: Tensor
    updates_PKD: Tensor
    first_memory: Memory
    last_memory: Memory
    num_read: int = 0

    def advance(self, tokens_P: Tensor) -> Tensor:
        """Read a token; returns the vectors that give the logits of the token after it, (P, D)."""
        head, place = self.head, self.num_read + 1
        x_PD, self.first_memory = head.first.step(head.embed(tokens_P), place, self.first_memory)
        x_PD = x_PD + self.updates_PKD[:, self.num_read]
        x_PD, self.last_memory = head.last.step(x_PD, place, self.last_memory)
        self.vectors_PD, self.num_read = head.norm(x_PD), place
        return self.vectors_PD
