"""Scoring in a process group: which process scores which batch, and reductions over all.

Without a group (torch.distributed not initialized), this process does everything.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, distributed

Batch = Mapping[str, Tensor]  # The features of calm.data.chunking; `document_ids` may be missing.
Item = TypeVar("Item")


def batches_of_process(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """This process's batches, every n-th of n processes, each with its index."""
    rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if _is_group() else (0, 1)
    for index, batch in enumerate(batches):
        if index % world_size == rank:
            yield index, batch


def add_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Sum tensors over all processes in rank order, so that all get bitwise the same result."""
    by_rank = gather_from_processes([[tensor.cpu() for tensor in tensors]])
    return [torch.stack(terms).sum(0) for terms in zip(*by_rank, strict=True)]


def gather_from_processes(items: list[Item]) -> list[Item]:
    """Concatenate the lists of all processes in rank order."""
    if not _is_group():
        return items
    by_rank: list[list[Item]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(by_rank, items)
    return [item for part in by_rank for item in part]


def _is_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
