"""Blocks -> batches: sampling order, collation, and what chunk-level networks have to provide."""

from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainingArguments, default_data_collator

from calm.core.chunks import IGNORED_LABEL
from calm.data.streaming import CURSOR, BlockStream
from calm.training.noise import number_of_block

NUMBERS = "block_numbers"


@runtime_checkable
class ChunkNetwork(Protocol):
    """A network that is trained on chunks: the autoencoder, or a CALM."""

    def count_targets(self, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Number of targets that the loss of a batch is averaged over."""

    def draw_training_noise(
        self, generators: Sequence[torch.Generator], input_ids: Tensor, labels: Tensor, **others: Any
    ) -> Any:
        """Draw the `noise` of a forward pass, separately for each row of the batch."""


def collate_chunks(blocks: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Collate blocks for a chunk-level model, with a number for each block that seeds its noise."""
    numbers = [number_of_block(block["input_ids"]) for block in blocks]
    return default_data_collator(blocks) | {NUMBERS: torch.tensor(numbers)}


def collate_tokens(blocks: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Collate blocks for a token-level model; the first token of each document is not a target."""
    batch = default_data_collator(blocks)
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORED_LABEL)
    # transformers only separates documents by their position ids if there is no cache.
    return batch | {"use_cache": False}


def whole_step_sampler(blocks: Sized, blocks_per_step: int) -> RandomSampler:
    """Sample blocks in random order, in whole steps; leftover blocks wait for another epoch.

    This way, every step has the same number of tokens, however many processes share it.

    Args:
        blocks: All blocks.
        blocks_per_step: Blocks per optimizer step over all processes.
    """
    return RandomSampler(blocks, num_samples=max(1, len(blocks) // blocks_per_step) * blocks_per_step)


def batches_of_stream(
    stream: BlockStream, size: int, collate: Callable[..., Any], arguments: TrainingArguments
) -> DataLoader:
    """Batches of a stream, in order, each with the reader's position after its last block.

    Args:
        stream: The stream; it knows what other processes read.
        size: Blocks per batch.
        collate: Collates blocks into a batch.
        arguments: The Trainer's arguments.
    """
    return DataLoader(
        stream,
        batch_size=size,
        collate_fn=partial(_with_cursor, collate=collate),
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
    )


def _with_cursor(blocks: list[dict[str, Tensor]], collate: Callable[..., Any]) -> dict[str, Any]:
    cursors = [block.pop(CURSOR) for block in blocks]
    return collate(blocks) | {CURSOR: cursors[-1]}
