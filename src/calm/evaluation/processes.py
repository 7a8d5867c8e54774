"""Scoring in a process group: which process scores which batch, and reductions over all.

Without a group (torch.distributed not initialized), this process does everything.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, distributed

Batch = Mapping[str, Tensor]  # The features of calm.data.chunking; `document_ids` may be missing.
Thing = TypeVar("Thing")


def own_share(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """This process's batches, every n-th of n processes, each with its index."""
    is_group = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if is_group else (0, 1)
    for index, batch in enumerate(batches):
        if index % world == rank:
            yield index, batch


def add_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Sum tensors over all processes in rank order, so that all get bitwise the same result."""
    everyones = gather_from_processes([[tensor.cpu() for tensor in tensors]])
    return [torch.stack(parts).sum(0) for parts in zip(*everyones, strict=True)]


def gather_from_processes(things: list[Thing]) -> list[Thing]:
    """Concatenate the lists of all processes in rank order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return things
    gathered: list[list[Thing]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, things)
    return [thing for part in gathered for thing in part]
