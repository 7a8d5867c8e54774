"""Training noise that depends only on the seed, the step and the block.

So the same blocks give the same loss on one process or many, in one batch or several, and after resuming.
"""

import torch
from torch import Tensor

from calm.core.random import seed_of


def number_of_block(input_ids_T: Tensor) -> int:
    """A number computed from the tokens of a block; it seeds the noise of that block."""
    return seed_of(input_ids_T.numpy().tobytes())


def generators_of_blocks(
    seed: int, step: int, numbers: list[int], device: torch.device
) -> list[torch.Generator]:
    """A random generator for each block.

    Args:
        seed: Seed of the run.
        step: Optimizer step.
        numbers: `number_of_block` of each block.
        device: Device on which the noise is drawn.
    """
    return [torch.Generator(device).manual_seed(seed_of(seed, step, number)) for number in numbers]
