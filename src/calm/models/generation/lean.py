"""A lean backbone step: what a decoder layer does for a single position, and nothing else.

The forward pass of transformers handles any number of positions, masks and caches, and spends more time on
that than on the matrix products of a small model. Here the layers' own modules are called, so adapters and
quantized weights work; around them are a rotation, an in-place write into the cache, and attention.

Shapes: R rows, K tokens per chunk, C chunks, G query heads, H key/value heads, d head size, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from calm.models.attention import NormedAttention, apply_rotary, project_qkv

# Rotary embeddings whose frequencies do not depend on the length of a text.
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
_ATTENTION = (LlamaAttention, NormedAttention)


class ChunkStep(nn.Module):
    """Computes the next state of each row from its last chunk and a cache.

    Args:
        model: A `CalmForCausalLM` for which `can_step` holds.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, chunks_RK: Tensor, length_R: Tensor, cache: Sequence[Tensor]) -> Tensor:
        """States (R, D + `extra_state_size`); keys and values are written after the end of each row.

        Args:
            chunks_RK: The last chunk of each row.
            length_R: Number of chunks before it.
            cache: Keys and values (R, H, C, d) of each layer in turn.
        """
        model, (_, num_heads, num_chunks, _) = self.model, cache[0].shape
        cos_R1d, sin_R1d = self._rotation(length_R)
        row_R1 = torch.arange(length_R.shape[0], device=length_R.device).unsqueeze(-1)
        slot = (row_R1, torch.arange(num_heads, device=length_R.device), length_R.unsqueeze(-1))
        is_seen_RC = torch.arange(num_chunks, device=length_R.device) <= length_R.unsqueeze(-1)
        x_RD = model.embed_chunks(chunks_RK)
        for layer, keys_RHCd, values_RHCd in zip(model.backbone.layers, cache[::2], cache[1::2], strict=True):
            attention = layer.self_attn
            normed_RD = layer.input_layernorm(x_RD)
            query_RGd, key_RHd, value_RHd = project_qkv(attention, normed_RD)
            query_RGd = apply_rotary(query_RGd, cos_R1d, sin_R1d)
            key_RHd = apply_rotary(key_RHd, cos_R1d, sin_R1d)
            # Under autocast, the cache has the dtype that autocast chose for the prompt.
            keys_RHCd.index_put_(slot, key_RHd.to(keys_RHCd.dtype))
            values_RHCd.index_put_(slot, value_RHd.to(values_RHCd.dtype))
            query_RGd = query_RGd.to(keys_RHCd.dtype)
            mixed_RX = _attend(query_RGd, keys_RHCd, values_RHCd, is_seen_RC, attention.scaling)
            x_RD = x_RD + attention.o_proj(mixed_RX)
            x_RD = x_RD + layer.mlp(layer.post_attention_layernorm(x_RD))
        states_RD: Tensor = model.backbone.norm(x_RD)
        extra_RX = model.head.embed_chunks(chunks_RK)
        return states_RD if extra_RX is None else torch.cat([states_RD, extra_RX], dim=-1)

    def _rotation(self, position_R: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotation at each row's position, (R, 1, d)."""
        rotary = self.model.backbone.rotary_emb
        # In single precision whatever the model's dtype: in half precision, distant positions would coincide.
        angles_Rh = position_R.unsqueeze(-1) * rotary.inv_freq.float()
        angles_R1d = torch.cat([angles_Rh, angles_Rh], dim=-1).unsqueeze(1)
        dtype, scaling = self.model.backbone.embed_tokens.weight.dtype, rotary.attention_scaling
        return (angles_R1d.cos() * scaling).to(dtype), (angles_R1d.sin() * scaling).to(dtype)


def can_step(model: Any) -> bool:
    """Whether a model's layers are plain Llama layers, without hooks that a lean step would bypass."""
    if model.backbone.rotary_emb.rope_type not in _FIXED_ROTATIONS:
        return False
    modules = [model.backbone, model.backbone.norm]
    for layer in model.backbone.layers:
        if type(layer) is not LlamaDecoderLayer or type(layer.self_attn) not in _ATTENTION:
            return False
        modules += [layer, layer.self_attn]
        if type(layer.mlp) is not LlamaMLP:
            return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks or _is_dispatched(module) for module in modules
    )


def _is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate moves a module's inputs between devices."""
    return hasattr(module, "_hf_hook")


def _attend(
    query_RGd: Tensor, keys_RHCd: Tensor, values_RHCd: Tensor, is_seen_RC: Tensor, scaling: float
) -> Tensor:
    """Attention of each row's query over its chunks, (R, G·d)."""
    if torch.compiler.is_compiling() and query_RGd.shape[0] == 1:
        # Fused loops are faster than a kernel made for many queries.
        query_RHgd = query_RGd.unflatten(1, (keys_RHCd.shape[1], -1)) * scaling
        scores_RHCg = (query_RHgd.unsqueeze(2) * keys_RHCd.unsqueeze(3)).sum(-1)
        scores_RHCg = scores_RHCg.masked_fill(~is_seen_RC[:, None, :, None], -torch.inf)
        weights_RHCg = scores_RHCg.float().softmax(2).to(values_RHCd.dtype)
        return (weights_RHCg.unsqueeze(-1) * values_RHCd.unsqueeze(3)).sum(2).flatten(1)
    mixed_RG1d = F.scaled_dot_product_attention(
        query_RGd.unsqueeze(2),
        keys_RHCd,
        values_RHCd,
        attn_mask=is_seen_RC[:, None, None],
        scale=scaling,
        enable_gqa=query_RGd.shape[1] != keys_RHCd.shape[1],
    )
    return mixed_RG1d.flatten(1)
