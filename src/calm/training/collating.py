"""Blocks -> batches, and how many targets a batch has."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import default_data_collator

from calm.core.chunks import IGNORED_LABEL
from calm.data.streaming import PLACE
from calm.training.noise import number_of_block

NUMBERS = "block_numbers"


def collate_chunks(blocks: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Blocks for a model of chunks, each with the number that names its noise."""
    numbers = [number_of_block(block["input_ids"]) for block in blocks]
    return default_data_collator(blocks) | {NUMBERS: torch.tensor(numbers)}


def collate_stream(blocks: list[dict[str, Tensor]], collate: Callable[..., Any]) -> dict[str, Any]:
    """A batch of a stream, with the place behind its last block."""
    places = [block.pop(PLACE) for block in blocks]
    return collate(blocks) | {PLACE: places[-1]}


def collate_tokens(blocks: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Blocks for a model of tokens, whose loss must not ask for the first token of the next document."""
    batch = default_data_collator(blocks)
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORED_LABEL)
    # transformers keeps documents apart by their positions only where there is no cache.
    return batch | {"use_cache": False}


def count_tokens(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Targets of a model of tokens: labels behind the first token."""
    return (labels[:, 1:] != IGNORED_LABEL).sum()
