"""Prompts as the backbone reads them: whole chunks, with the padding in front, and thoughts behind.

Shapes: B batch, T tokens, K tokens per chunk, C chunks, D state size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from calm.core.chunks import align_to_chunks, positions_of
from calm.models.thoughts import THOUGHT, Thoughts
from calm.models.writing.model import ChunkModel


class Prompt(NamedTuple):
    """Prompts in chunks; each ends on a chunk boundary.

    Args:
        ids_BT: Tokens, T a multiple of K; `THOUGHT` where a chunk is a thought.
        mask_BC: 1 on chunks that hold any token of the prompt.
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

    def followed_by(self, thoughts: Thoughts | None, chunk_size: int) -> "Prompt":
        """The same with what is thought after each, if anything is."""
        return self if thoughts is None else self.with_chunks(thoughts.tokens(chunk_size), chunk_size)

    def with_chunks(self, tokens: Sequence[int], chunk_size: int) -> "Prompt":
        """The same with the same chunks behind each.

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
        """State of every chunk, (B, C, D); with a cache, that is filled.

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
        mask_BC: Of all chunks, those in the cache included.
        position_BC: Their positions.
        cache: Chunks before them; these are added.
        forward: What to call in the model's place, such as the compiled model.
        may_think: Whether any of them may be thoughts.
        state_before: States before them, where a row may begin with a thought.
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
