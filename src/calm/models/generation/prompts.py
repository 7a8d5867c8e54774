"""Prompts as the backbone reads them: whole chunks, padded in front, with thoughts after them.

Shapes: B batch, T tokens, K tokens per chunk, C chunks, D state size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from calm.core.chunks import align_to_chunks, positions_of
from calm.models.generation.model import ChunkModel
from calm.models.thoughts import THOUGHT, Thoughts


class Prompt(NamedTuple):
    """Prompts in chunks; each ends on a chunk boundary.

    Args:
        ids_BT: Tokens, T a multiple of K; `THOUGHT` where a chunk is a thought.
        mask_BC: 1 on chunks that contain any token of the prompt.
        position_BC: Position of each chunk.
        thinks: Whether there are thoughts.
    """

    ids_BT: Tensor
    mask_BC: Tensor
    position_BC: Tensor
    thinks: bool = False

    @classmethod
    def aligned(
        cls, model: ChunkModel, ids_BT: Tensor, mask_BT: Tensor, pad_token_id: int | None = None
    ) -> "Prompt":
        """Align prompts to chunks.

        Args:
            model: The model.
            ids_BT: Prompts with padding anywhere, where the mask is 0.
            mask_BT: 1 on their tokens.
            pad_token_id: What fills up their first chunks; the model's padding token if None.
        """
        pad = (model.config.pad_token_id or 0) if pad_token_id is None else pad_token_id
        aligned_BT, mask_BC = align_to_chunks(ids_BT, mask_BT, model.config.chunk_size, pad)
        return cls(aligned_BT, mask_BC, positions_of(mask_BC))

    @classmethod
    def of(cls, model: ChunkModel, tokens: Sequence[int]) -> "Prompt":
        """A single prompt."""
        ids_1T = torch.tensor([list(tokens)], device=model.device)
        return cls.aligned(model, ids_1T, torch.ones_like(ids_1T))

    def followed_by(self, thoughts: Thoughts | None, chunk_size: int) -> "Prompt":
        """Append thoughts to each prompt, if there are any."""
        return self if thoughts is None else self.with_chunks(thoughts.tokens(chunk_size), chunk_size)

    def with_chunks(self, tokens: Sequence[int], chunk_size: int) -> "Prompt":
        """Append the same chunks to each prompt.

        Args:
            tokens: Tokens of the chunks, or `THOUGHT` where a chunk is a thought.
            chunk_size: Tokens per chunk K.
        """
        if not tokens:
            return self
        more_BT = torch.tensor(list(tokens), device=self.ids_BT.device).expand(len(self.ids_BT), -1)
        mask_BC = torch.nn.functional.pad(self.mask_BC, (0, len(tokens) // chunk_size), value=1)
        ids_BT = torch.cat([self.ids_BT, more_BT], dim=1)
        return Prompt(ids_BT, mask_BC, positions_of(mask_BC), thinks=self.thinks or THOUGHT in tokens)

    def read(self, model: ChunkModel, cache: Cache | None = None) -> Tensor:
        """State of every chunk, (B, C, D); fills the cache, if one is given.

        Args:
            model: The model.
            cache: An empty cache.
        """
        return read_chunks(model, self.ids_BT, self.mask_BC, self.position_BC, cache, may_think=self.thinks)


def read_chunks(
    model: ChunkModel,
    ids_BT: Tensor,
    mask_BC: Tensor,
    position_BC: Tensor,
    cache: Cache | None,
    forward: Any = None,
    may_think: bool = False,
    state_before: Tensor | None = None,
) -> Tensor:
    """States of some chunks, (B, C, D), after those in the cache.

    Args:
        model: The model.
        ids_BT: Their tokens.
        mask_BC: Mask of all chunks, including those in the cache.
        position_BC: Their positions.
        cache: The chunks before them; these are appended.
        forward: What to call instead of the model, such as its compiled version.
        may_think: Whether any of them may be thoughts.
        state_before: The states before them, if a row may start with a thought.
    """
    size, thinking = model.config.chunk_size, {}
    if may_think and bool((is_thought_BC := ids_BT[:, ::size] == THOUGHT).any()):
        thinking = {"is_thought": is_thought_BC, "state_before": state_before}
    outputs = (forward or model)(
        ids_BT,
        attention_mask=mask_BC.repeat_interleave(size, dim=1),
        position_ids=position_BC,
        cache=cache,
        use_cache=cache is not None,
        **thinking,
    )
    states_BCD: Tensor = outputs.last_hidden_state
    return states_BCD
