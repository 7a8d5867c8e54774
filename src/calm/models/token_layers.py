"""Layers of a Llama over the tokens of a chunk: attention stays inside a window, and sees a sink before it.

The layers of a trained Transformer expect a first token to which attention goes where it is not needed
(Xiao et al., arXiv 2309.17453). Windows of a few tokens have none, so each layer keeps the key and the value
of one, at position 0; the tokens of a window follow from 1 on.

Shapes: M windows, W tokens of a window, D hidden size, G heads of queries, H heads of keys and values, d
their size.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

Memory = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer at the earlier tokens of a window, (M, H, W, d)."""


class TokenLayer(LlamaDecoderLayer):
    """A layer of a Llama whose windows all see the same sink."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__(config, index)
        shape = (heads_of_keys(config), 1, head_size(config))
        self.sink_key, self.sink_value = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def forward(  # type: ignore[override]
        self, x_MWD: Tensor, cos_1Wd: Tensor, sin_1Wd: Tensor, earlier: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States (M, W, D), and keys and values of earlier and these tokens.

        Args:
            x_MWD: States that the layer reads.
            cos_1Wd: Of the angles of their positions.
            sin_1Wd: Likewise.
            earlier: Keys and values of the tokens before, rotated.
        """
        attention, normed_MWD = self.self_attn, self.input_layernorm(x_MWD)
        query_MGWd, keys, values = (
            project(normed_MWD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query_MGWd, keys = rotated(query_MGWd, cos_1Wd, sin_1Wd), rotated(keys, cos_1Wd, sin_1Wd)
        if earlier is not None:
            keys = torch.cat([earlier[0].to(keys.dtype), keys], dim=2)
            values = torch.cat([earlier[1].to(values.dtype), values], dim=2)
        all_keys, all_values = (
            torch.cat([sink.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], dim=2)
            for sink, own in ((self.sink_key, keys), (self.sink_value, values))
        )
        width, num_keys = x_MWD.shape[1], all_keys.shape[2]
        is_seen = torch.ones(width, num_keys, dtype=torch.bool, device=x_MWD.device).tril(num_keys - width)
        mixed_MGWd = F.scaled_dot_product_attention(
            query_MGWd.to(all_keys.dtype),
            all_keys,
            all_values.to(all_keys.dtype),
            attn_mask=None if width == 1 else is_seen,
            scale=attention.scaling,
            enable_gqa=query_MGWd.shape[1] != all_keys.shape[1],
        )
        x_MWD = x_MWD + attention.o_proj(mixed_MGWd.transpose(1, 2).flatten(-2))
        return x_MWD + self.mlp(self.post_attention_layernorm(x_MWD)), keys, values


class TokenLayers(nn.Module):
    """Such layers one after the other.

    Args:
        config: Sizes of the layers.
        num_layers: Number of layers; may be 0.
    """

    def __init__(self, config: LlamaConfig, num_layers: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(TokenLayer(config, index) for index in range(num_layers))
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, x_MWD: Tensor) -> Tensor:
        """All tokens of some windows at once, (M, W, D)."""
        return self._run(x_MWD, 0, [None] * len(self.layers))[0]

    def step(self, x_MD: Tensor, place: int, memory: Memory) -> tuple[Tensor, Memory]:
        """The next token of some windows: what `forward` gives at its place, (M, D), and a longer memory.

        Args:
            x_MD: What the layers read at the place.
            place: Tokens of each window before it.
            memory: Of those; not looked at for the first.
        """
        earlier: list[Any] = memory if place else [None] * len(self.layers)
        x_M1D, longer = self._run(x_MD.unsqueeze(1), place, earlier)
        return x_M1D.squeeze(1), longer

    def _run(
        self, x_MWD: Tensor, place: int, earlier: list[tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, Memory]:
        memory: Memory = []
        if not len(self.layers):
            return x_MWD, memory
        position_W = torch.arange(x_MWD.shape[1], device=x_MWD.device) + place + 1
        cos_1Wd, sin_1Wd = self.rotary_emb(x_MWD, position_W.unsqueeze(0))
        for layer, before in zip(self.layers, earlier, strict=True):
            x_MWD, keys, values = layer(x_MWD, cos_1Wd, sin_1Wd, before)
            memory.append((keys, values))
        return x_MWD, memory

    @property
    def memory_size(self) -> int:
        """Numbers of the memory of one token."""
        return 2 * len(self.layers) * heads_of_keys(self.config) * head_size(self.config)

    def pack(self, memory: Memory) -> Tensor:
        """The memory of windows of one token as a matrix, (M, `memory_size`); there must be layers."""
        return torch.cat([part.flatten(1) for pair in memory for part in pair], dim=-1)

    def unpack(self, packed_MX: Tensor) -> Memory:
        """The memory that `pack` was given."""
        if not len(self.layers):
            return []
        shape = (len(self.layers), 2, heads_of_keys(self.config), 1, head_size(self.config))
        return [(pair[:, 0], pair[:, 1]) for pair in packed_MX.unflatten(-1, shape).unbind(1)]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys, in the halves of Llama; shapes that broadcast."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


LAYER_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias", "rope_parameters",
)  # fmt: skip
"""What a `LlamaConfig` says of a single layer."""


def layer_sizes(config: LlamaConfig) -> dict[str, Any]:
    """The arguments of `LlamaConfig` for layers of the same sizes."""
    return {name: copy.deepcopy(getattr(config, name)) for name in LAYER_SIZES}


def weights_of_layer(config: LlamaConfig) -> int:
    """Multiply-adds of a layer at one position, attention scores aside."""
    queries, keys = config.num_attention_heads * head_size(config), heads_of_keys(config) * head_size(config)
    return config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)


def multiply_adds_of_layer(config: LlamaConfig, num_keys: int) -> int:
    """Multiply-adds of a layer at one position that sees so many keys."""
    return weights_of_layer(config) + 2 * num_keys * config.num_attention_heads * head_size(config)


def heads_of_keys(config: LlamaConfig) -> int:
    """Heads H of keys and values."""
    return config.num_key_value_heads or config.num_attention_heads


def head_size(config: LlamaConfig) -> int:
    """Size d of an attention head."""
    return config.head_dim or config.hidden_size // config.num_attention_heads
