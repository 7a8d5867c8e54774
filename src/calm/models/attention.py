"""Attention of the backbone and of layers over tokens: Llama's, or with queries and keys that are normed.

Shapes: X any leading axes, D hidden size, G heads of queries, H heads of keys and values, d their size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

QK_NORM = "use_qk_norm"
"""Name of a switch that a `LlamaConfig` may have: whether heads norm their queries and keys."""


class NormedAttention(LlamaAttention):
    """Attention that norms the queries and keys of each head before their positions (Qwen3)."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__(config, index)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.sliding_window = None  # Its forward pass looks for one.

    forward = Qwen3Attention.forward  # type: ignore[assignment]


def norm_queries_and_keys(layer: nn.Module, config: LlamaConfig, index: int) -> None:
    """Give a new layer of a Llama `NormedAttention`, if its configuration says so."""
    if has_qk_norm(config):
        layer.self_attn = NormedAttention(config, index)


def has_qk_norm(config: LlamaConfig) -> bool:
    """Whether the layers of a configuration norm their queries and keys."""
    return bool(getattr(config, QK_NORM, False))


def projected(attention: Any, states_XD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (X, G, d), keys and values (X, H, d) of some states, before their positions.

    Args:
        attention: A `LlamaAttention`.
        states_XD: What the layer's first norm gave.
    """
    query_XGd, key_XHd, value_XHd = (
        project(states_XD).unflatten(-1, (-1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if isinstance(attention, NormedAttention):
        return attention.q_norm(query_XGd), attention.k_norm(key_XHd), value_XHd
    return query_XGd, key_XHd, value_XHd


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys, in the halves of Llama; shapes that broadcast."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
