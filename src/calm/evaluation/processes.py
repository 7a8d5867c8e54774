"""Scores in a group of processes: who scores which batch, and sums over all.

Without a group (torch.distributed not initialised) everything is this process's.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, distributed

Block = Mapping[str, Tensor]  # `input_ids`, `labels`, `position_ids` of calm.data.chunking.


def own_share(blocks: Iterable[Block]) -> Iterator[tuple[int, Block]]:
    """Every n-th batch and its number, for n processes."""
    is_group = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if is_group else (0, 1)
    for index, block in enumerate(blocks):
        if index % world == rank:
            yield index, block


def add_over_processes(tensors: list[Tensor]) -> list[Tensor]:
    """Sums over all processes, added in the order of the processes: the same digits for each of them."""
    return [torch.stack(parts).sum(0) for parts in zip(*_gather(tensors), strict=True)]


def largest_of_processes(number: Tensor) -> Tensor:
    """The largest of a number that each process has."""
    return torch.stack([part for (part,) in _gather([number])]).amax()


def _gather(tensors: list[Tensor]) -> list[list[Tensor]]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [tensors]
    gathered: list[list[Tensor]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, [tensor.cpu() for tensor in tensors])
    return gathered
