"""Llama layers over the tokens of a chunk: attention is limited to a window and a sink before it.

The layers of a trained Transformer expect a first token to attend to when nothing else matters, an attention
sink (Xiao et al., arXiv 2309.17453). Windows of a few tokens have none, so each layer stores the key and
value of one, at position 0; the tokens of a window start at position 1. Without a sink they start at 0.

Shapes: M windows, W tokens per window, X = M·W, D hidden size, G query heads, H key-value heads, d head size.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from calm.models.attention import QK_NORM, add_qk_norm, apply_rotary, has_qk_norm, project_qkv

Memory = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer for the earlier tokens of a window, (M, H, W, d)."""


class TokenLayer(LlamaDecoderLayer):
    """A Llama layer in which all windows see the same sink, if there is one."""

    sink_key: nn.Parameter | None
    sink_value: nn.Parameter | None

    def __init__(self, config: LlamaConfig, index: int, sink: bool = True) -> None:
        super().__init__(config, index)
        add_qk_norm(self, config, index)
        shape = (num_key_value_heads(config), 1, head_size(config))
        for name in ("sink_key", "sink_value"):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)) if sink else None)

    @property
    def sinks(self) -> list[nn.Parameter]:
        """Key and value of the sink, if there is one."""
        return [sink for sink in (self.sink_key, self.sink_value) if sink is not None]

    def forward(  # type: ignore[override]
        self, x_XD: Tensor, cos_1Wd: Tensor, sin_1Wd: Tensor, earlier: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output states (M·W, D), and keys and values of the earlier tokens and these, (M, H, all tokens, d).

        The tokens of all windows share one axis: with a single token per window, products with three axes do
        not compile.

        Args:
            x_XD: Input states, window after window.
            cos_1Wd: Cosines of the rotary angles of the tokens' positions.
            sin_1Wd: Sines of the same angles.
            earlier: Keys and values of earlier tokens of the windows, after rotary embedding.
        """
        attention: Any = self.self_attn
        width = cos_1Wd.shape[1]
        query_MGWd, keys, values = (
            heads.unflatten(0, (-1, width)).transpose(1, 2)
            for heads in project_qkv(attention, self.input_layernorm(x_XD))
        )
        query_MGWd = apply_rotary(query_MGWd, cos_1Wd, sin_1Wd)
        keys = apply_rotary(keys, cos_1Wd, sin_1Wd)
        if earlier is not None:
            keys = torch.cat([earlier[0].to(keys.dtype), keys], dim=2)
            values = torch.cat([earlier[1].to(values.dtype), values], dim=2)
        all_keys, all_values = _prepend(self.sink_key, keys), _prepend(self.sink_value, values)
        num_keys = all_keys.shape[2]
        is_seen = torch.ones(width, num_keys, dtype=torch.bool, device=x_XD.device).tril(num_keys - width)
        mixed_MGWd = F.scaled_dot_product_attention(
            query_MGWd.to(all_keys.dtype),
            all_keys,
            all_values.to(all_keys.dtype),
            attn_mask=None if width == 1 else is_seen,
            dropout_p=attention.attention_dropout if self.training else 0.0,
            scale=attention.scaling,
            enable_gqa=query_MGWd.shape[1] != all_keys.shape[1],
        )
        x_XD = x_XD + attention.o_proj(mixed_MGWd.transpose(1, 2).flatten(-2).flatten(0, 1))
        return x_XD + self.mlp(self.post_attention_layernorm(x_XD)), keys, values


def _prepend(sink: Tensor | None, x_MHWd: Tensor) -> Tensor:
    """Keys or values of each window, preceded by that of the sink if there is one."""
    if sink is None:
        return x_MHWd
    return torch.cat([sink.to(x_MHWd.dtype).expand(x_MHWd.shape[0], -1, -1, -1), x_MHWd], dim=2)


class TokenLayers(nn.Module):
    """A stack of `TokenLayer`s.

    Args:
        config: Sizes of the layers.
        num_layers: Number of layers; may be 0.
        sink: Whether windows see a sink.
    """

    def __init__(self, config: LlamaConfig, num_layers: int, sink: bool = True) -> None:
        super().__init__()
        self.config, self._first_position = config, int(sink)
        self.layers = nn.ModuleList(TokenLayer(config, index, sink) for index in range(num_layers))
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, x_MWD: Tensor) -> Tensor:
        """Output states of whole windows, (M, W, D), all tokens at once."""
        return self._run(x_MWD, 0, [None] * len(self.layers))[0]

    def step(self, x_MD: Tensor, index: int, memory: Memory) -> tuple[Tensor, Memory]:
        """Run the next token of each window: its output as in `forward`, (M, D), and the extended memory.

        Args:
            x_MD: Input at this token.
            index: Index of the token in its window.
            memory: Memory of the tokens before it; ignored for the first.
        """
        earlier: list[Any] = memory if index else [None] * len(self.layers)
        x_M1D, extended = self._run(x_MD.unsqueeze(1), index, earlier)
        return x_M1D.squeeze(1), extended

    def _run(
        self, x_MWD: Tensor, start: int, earlier: list[tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, Memory]:
        memory: Memory = []
        if not len(self.layers):
            return x_MWD, memory
        position_W = torch.arange(x_MWD.shape[1], device=x_MWD.device) + self._first_position + start
        cos_1Wd, sin_1Wd = self.rotary_emb(x_MWD, position_W.unsqueeze(0))
        x_XD = x_MWD.flatten(0, 1)
        for layer, cached in zip(self.layers, earlier, strict=True):
            x_XD, keys, values = layer(x_XD, cos_1Wd, sin_1Wd, cached)
            memory.append((keys, values))
        return x_XD.view_as(x_MWD), memory

    @property
    def memory_size(self) -> int:
        """Number of entries in the memory of one token."""
        return 2 * len(self.layers) * num_key_value_heads(self.config) * head_size(self.config)

    def pack(self, memory: Memory) -> Tensor:
        """Flatten the memory of one-token windows to a matrix, (M, `memory_size`); there must be layers."""
        return torch.cat([part.flatten(1) for pair in memory for part in pair], dim=-1)

    def unpack(self, packed_MX: Tensor) -> Memory:
        """Undo `pack`."""
        if not len(self.layers):
            return []
        shape = (len(self.layers), 2, num_key_value_heads(self.config), 1, head_size(self.config))
        return [(pair[:, 0], pair[:, 1]) for pair in packed_MX.unflatten(-1, shape).unbind(1)]


LAYER_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias", "rope_parameters",
    "attention_dropout",
)  # fmt: skip
"""Fields of a `LlamaConfig` that describe a single layer."""
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
"""Model types with Llama-style layers, some with biases or normalized queries and keys."""


def layer_sizes(config: LlamaConfig) -> dict[str, Any]:
    """Arguments of `LlamaConfig` for layers of the same sizes."""
    sizes = {name: copy.deepcopy(getattr(config, name)) for name in LAYER_SIZES}
    return sizes | ({QK_NORM: True} if has_qk_norm(config) else {})


def num_layer_weights(config: LlamaConfig) -> int:
    """Weights in the matrices of a layer, which is also its multiply-adds per position without attention."""
    queries = config.num_attention_heads * head_size(config)
    keys = num_key_value_heads(config) * head_size(config)
    return config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)


def multiply_adds_of_layer(config: LlamaConfig, num_keys: int) -> int:
    """Multiply-adds of a layer at one position that attends to `num_keys` keys."""
    return num_layer_weights(config) + 2 * num_keys * config.num_attention_heads * head_size(config)


def num_key_value_heads(config: LlamaConfig) -> int:
    """Number of key-value heads H."""
    return config.num_key_value_heads or config.num_attention_heads


def head_size(config: Any) -> int:
    """Size d of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
