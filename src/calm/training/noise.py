"""Training noise that depends on the seed, the step and the block alone.

So the same blocks give the same loss on one process or many, at once or one after the other, and behind a
resumed run.
"""

import hashlib

import torch
from torch import Tensor

_BYTES = 7  # A seed of torch has 63 bits without its sign.


def number_of_block(input_ids_T: Tensor) -> int:
    """A number for the text of a block, which names its noise."""
    return int.from_bytes(_digest(input_ids_T.numpy().tobytes()), "big")


def generators_of_blocks(
    seed: int, step: int, numbers: list[int], device: torch.device
) -> list[torch.Generator]:
    """A source of noise for each block.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        numbers: Of the blocks, by `number_of_block`.
        device: Where the noise is drawn.
    """
    seeds = [int.from_bytes(_digest(repr((seed, step, number)).encode()), "big") for number in numbers]
    return [torch.Generator(device).manual_seed(value) for value in seeds]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_BYTES).digest()
