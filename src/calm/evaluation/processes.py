"""Scores in a group of processes: who scores which batch, and sums over all.

Without a group (torch.distributed not initialized) everything is this process's.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, distributed

Block = Mapping[str, Tensor]  # The features of calm.data.chunking; `document_ids` may be missing.
Thing = TypeVar("Thing")


def own_share(blocks: Iterable[Block]) -> Iterator[tuple[int, Block]]:
    """Every n-th batch and its number, for n processes."""
    is_group = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if is_group else (0, 1)
    for index, block in enumerate(blocks):
        if index % world == rank:
            yield index, block


def add_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Sums over all processes, added in the order of the processes: the same digits for each of them."""
    everyones = gather_from_processes([[tensor.cpu() for tensor in tensors]])
    return [torch.stack(parts).sum(0) for parts in zip(*everyones, strict=True)]


def gather_from_processes(things: list[Thing]) -> list[Thing]:
    """What each process has, in the order of the processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return things
    gathered: list[list[Thing]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, things)
    return [thing for part in gathered for thing in part]
