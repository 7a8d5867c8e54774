"""Prompts as the backbone reads them: whole chunks, with the padding in front.

Shapes: B batch, T tokens, K tokens per chunk, C chunks, D state size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from calm.core.chunks import align_to_chunks
from calm.models.writing.model import ChunkModel


class Prompt(NamedTuple):
    """Prompts in chunks; each ends on a chunk boundary.

    Args:
        ids_BT: Tokens, T a multiple of K.
        mask_BC: 1 on chunks that hold any token of the prompt.
        position_BC: Position of each chunk.
    """

    ids_BT: Tensor
    mask_BC: Tensor
    position_BC: Tensor

    @classmethod
    def aligned(
        cls, model: ChunkModel, ids_BT: Tensor, mask_BT: Tensor, pad_token_id: int | None = None
    ) -> "Prompt":
        """Prompts with padding anywhere, where the mask is 0.

        Args:
            model: The model.
            ids_BT: Prompts with padding anywhere.
            mask_BT: 1 on their tokens.
            pad_token_id: What fills their first chunks; the model's when None.
        """
        pad = (model.config.pad_token_id or 0) if pad_token_id is None else pad_token_id
        aligned_BT, mask_BC = align_to_chunks(ids_BT, mask_BT, model.config.chunk_size, pad)
        return cls(aligned_BT, mask_BC, positions_of(mask_BC))

    @classmethod
    def of(cls, model: ChunkModel, tokens: Sequence[int]) -> "Prompt":
        """A single prompt."""
        ids_1T = torch.tensor([list(tokens)], device=model.device)
        return cls.aligned(model, ids_1T, torch.ones_like(ids_1T))

    def read(self, model: ChunkModel, cache: Cache | None = None) -> Tensor:
        """State of every chunk, (B, C, D); with a cache, that is filled.

        Args:
            model: The model.
            cache: An empty cache.
        """
        return read_chunks(model, self.ids_BT, self.mask_BC, self.position_BC, cache)


def positions_of(mask_BC: Tensor) -> Tensor:
    """Position of each chunk among those that hold text."""
    return (mask_BC.cumsum(-1) - 1).clamp_min(0)


def read_chunks(
    model: ChunkModel,
    ids_BT: Tensor,
    mask_BC: Tensor,
    position_BC: Tensor,
    cache: Cache | None,
    forward: Any = None,
) -> Tensor:
    """States of some chunks, (B, C, D), after those in the cache.

    Args:
        model: The model.
        ids_BT: Their tokens.
        mask_BC: Of all chunks, those in the cache included.
        position_BC: Their positions.
        cache: Chunks before them; these are added.
        forward: What to call in the model's place, such as the compiled model.
    """
    outputs = (forward or model)(
        ids_BT,
        attention_mask=mask_BC.repeat_interleave(model.config.chunk_size, dim=1),
        position_ids=position_BC,
        cache=cache,
        use_cache=cache is not None,
    )
    states_BCD: Tensor = outputs.last_hidden_state
    return states_BCD
