"""BrierLM of anything that can draw the next chunk (paper section 4).

Shapes: B batch, T tokens, K tokens per chunk, C chunks, P target chunks, N draws.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calm.core.brier import NUM_ORDERS, brier_lm, brier_scores
from calm.core.chunks import as_id_tensor, end_after_eos, find_targets, split_into_chunks
from calm.errors import InputError
from calm.models.calm import CalmForCausalLM

Block = Mapping[str, Tensor]  # `input_ids`, `labels`, `position_ids` of calm.data.chunking.


class ChunkSampler(Protocol):
    """Draws next chunks given the true chunks before them."""

    chunk_size: int

    def draw_next_chunks(
        self, block: Block, is_target_BC: Tensor, num_draws: int, generator: torch.Generator
    ) -> Tensor:
        """Independent draws of every target chunk, (N, P, K), in the order of `is_target_BC`.

        Args:
            block: Blocks of text, (B, T).
            is_target_BC: Which of the chunks 1..C-1 to draw.
            num_draws: Number of draws N.
            generator: Source of randomness.
        """


class CalmSampler:
    """A CALM as a sampler of chunks at temperature 1."""

    def __init__(self, model: CalmForCausalLM) -> None:
        self.model = model
        self.chunk_size = model.config.chunk_size

    def draw_next_chunks(
        self, block: Block, is_target_BC: Tensor, num_draws: int, generator: torch.Generator
    ) -> Tensor:
        """See `ChunkSampler`."""
        hidden_BCD = self.model.hidden_states_of_chunks(
            block["input_ids"], position_ids=block["position_ids"]
        )
        return self.model.draw_chunks(hidden_BCD[:, :-1][is_target_BC], num_draws, generator)


@dataclass(frozen=True)
class BrierResult:
    """Mean scores over held-out chunks.

    Args:
        means: Brier-1 to Brier-K, as fractions.
        num_chunks: Number of scored chunks.
        context: Tokens of a block: scores of other contexts do not compare.
    """

    means: tuple[float, ...]
    num_chunks: int
    context: int

    @property
    def brier_lm(self) -> float:
        """BrierLM in 0..100."""
        return brier_lm(self.means)

    def as_metrics(self) -> dict[str, float]:
        """BrierLM and Brier-1..4 in percent, under short names."""
        orders = {f"brier_{i + 1}": 100 * mean for i, mean in enumerate(self.means[:NUM_ORDERS])}
        return {"brier_lm": self.brier_lm, **orders}


@torch.no_grad()
def evaluate_brier(
    sampler: ChunkSampler,
    blocks: Iterable[Block],
    *,
    eos_token_id: int | list[int] | None,
    pad_token_id: int,
    generator: torch.Generator,
) -> BrierResult:
    """Brier-1..K of a sampler on every target chunk, from two draws each.

    What follows EOS in a chunk is padding in draws and text alike, so the end of a text is an
    outcome like any other, and all samplers meet the same outcomes.

    Args:
        sampler: What to score.
        blocks: Held-out blocks.
        eos_token_id: Ids that end a text.
        pad_token_id: Padding after the end.
        generator: Source of the draws.

    Raises:
        InputError: If K < 4, or the blocks hold no target.
    """
    size = sampler.chunk_size
    if size < NUM_ORDERS:
        raise InputError(f"BrierLM of chunks shorter than {NUM_ORDERS} tokens is not supported, got {size}.")
    total_K, num_chunks, context = torch.zeros(size, dtype=torch.float64), 0, 0
    for block in blocks:
        is_target_BC = find_targets(block["labels"], block["position_ids"], size)
        if not bool(is_target_BC.any()):
            continue
        draws_NPK = sampler.draw_next_chunks(block, is_target_BC, 2, generator)
        target_PK = split_into_chunks(block["input_ids"], size)[:, 1:][is_target_BC]
        eos_ids = as_id_tensor(eos_token_id, target_PK.device)
        draws_NPK, _ = end_after_eos(draws_NPK, eos_ids, pad_token_id)
        target_PK, _ = end_after_eos(target_PK, eos_ids, pad_token_id)
        scores_PK = brier_scores(draws_NPK[0], draws_NPK[1], target_PK)
        total_K += scores_PK.double().sum(0).cpu()
        num_chunks += len(scores_PK)
        context = block["input_ids"].shape[-1]
    if num_chunks == 0:
        raise InputError("the held-out text has no chunk to score; give more text.")
    return BrierResult(tuple((total_K / num_chunks).tolist()), num_chunks, context)
