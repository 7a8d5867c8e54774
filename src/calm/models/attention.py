"""Attention of the backbone and of token layers: Llama's, optionally with normalized queries and keys.

Shapes: X any leading axes, D hidden size, G query heads, H key-value heads, d head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

QK_NORM = "use_qk_norm"
"""Name of an optional `LlamaConfig` flag: whether heads normalize their queries and keys."""


class NormedAttention(LlamaAttention):
    """Attention that normalizes each head's queries and keys before rotary embedding (Qwen3)."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__(config, index)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.sliding_window = None  # Qwen3's forward pass reads it.

    forward = Qwen3Attention.forward  # type: ignore[assignment]


def add_qk_norm(layer: nn.Module, config: LlamaConfig, index: int) -> None:
    """Normalize queries and keys in a new Llama layer, if the configuration asks for it."""
    if has_qk_norm(config):
        layer.self_attn = NormedAttention(config, index)


def has_qk_norm(config: LlamaConfig) -> bool:
    """Whether a configuration's layers normalize queries and keys."""
    return bool(getattr(config, QK_NORM, False))


def project_qkv(attention: Any, states_XD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project states to queries (X, G, d), keys and values (X, H, d), before rotary embedding.

    Args:
        attention: A `LlamaAttention`.
        states_XD: Output of the layer's first norm.
    """
    query_XGd, key_XHd, value_XHd = (
        project(states_XD).unflatten(-1, (-1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if isinstance(attention, NormedAttention):
        return attention.q_norm(query_XGd), attention.k_norm(key_XHd), value_XHd
    return query_XGd, key_XHd, value_XHd


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to queries or keys, in Llama's half-split layout; shapes broadcast."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
