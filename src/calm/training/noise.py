"""Training noise that depends on the seed, the step and the block alone.

So the same blocks give the same loss on one process or many, at once or one after the other, and behind a
resumed run.
"""

import torch
from torch import Tensor

from calm.core.random import seed_of


def number_of_block(input_ids_T: Tensor) -> int:
    """A number for the text of a block, which names its noise."""
    return seed_of(input_ids_T.numpy().tobytes())


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
    return [torch.Generator(device).manual_seed(seed_of(seed, step, number)) for number in numbers]
