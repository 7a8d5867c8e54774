"""Blocks -> batches: their order, what accompanies them, and how many targets each has."""

from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainingArguments, default_data_collator

from calm.core.chunks import IGNORED_LABEL
from calm.data.streaming import PLACE, BlockStream
from calm.training.noise import number_of_block

NUMBERS = "block_numbers"


@runtime_checkable
class ChunkNetwork(Protocol):
    """A network that is trained on chunks: the autoencoder, or a CALM."""

    def count_targets(self, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """What the loss of a batch is a mean over."""

    def draw_training_noise(
        self, generators: Sequence[torch.Generator], input_ids: Tensor, labels: Tensor, **others: Any
    ) -> Any:
        """The `noise` of a forward pass, drawn for each row of a batch by itself."""


def collate_chunks(blocks: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A batch for a model of chunks, with the number of each block that seeds its noise."""
    numbers = [number_of_block(block["input_ids"]) for block in blocks]
    return default_data_collator(blocks) | {NUMBERS: torch.tensor(numbers)}


def collate_tokens(blocks: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A batch for a model of tokens; the first token of each document is not a target."""
    batch = default_data_collator(blocks)
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORED_LABEL)
    # transformers separates documents by their positions only without a cache.
    return batch | {"use_cache": False}


def whole_steps(blocks: Sized, step: int) -> RandomSampler:
    """A random order of whole steps; blocks that do not fill one wait for another epoch.

    So every step has the same number of tokens, however many processes share it.

    Args:
        blocks: All blocks.
        step: Blocks of an optimizer step.
    """
    return RandomSampler(blocks, num_samples=max(1, len(blocks) // step) * step)


def batches_of_stream(
    stream: BlockStream, size: int, collate: Callable[..., Any], arguments: TrainingArguments
) -> DataLoader:
    """Batches of a stream in its own order, each with the place after its last block.

    Args:
        stream: The stream; it knows what other processes read.
        size: Blocks of a batch.
        collate: Blocks -> a batch.
        arguments: Those of the Trainer.
    """
    return DataLoader(
        stream,
        batch_size=size,
        collate_fn=partial(_with_place, collate=collate),
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
    )


def _with_place(blocks: list[dict[str, Tensor]], collate: Callable[..., Any]) -> dict[str, Any]:
    places = [block.pop(PLACE) for block in blocks]
    return collate(blocks) | {PLACE: places[-1]}
