"""What does the cross-entropy over a vocabulary cost in a training step, in float32 and in bf16?

    python benchmarks/cross_entropy.py

Loss and gradients by `calm.core.cross_entropy`, in turns with the obvious way: all logits in memory.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measure import in_turns, machine, ratios
from torch import Tensor
from torch.nn import functional

from calm.core.cross_entropy import cross_entropy

SIZES = ((2048, 64, 2048), (4096, 128, 4064), (49_152, 128, 2048), (49_152, 576, 2048), (128_256, 512, 1024))
"""Vocabulary size, width of the vectors, and number of rows."""


def obvious(vectors_MX: Tensor, table_VX: Tensor, targets_M: Tensor) -> Tensor:
    """All logits, then their cross-entropy."""
    return functional.cross_entropy(
        functional.linear(vectors_MX, table_VX).float(), targets_M, reduction="none"
    )


def step(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], is_mixed: bool) -> None:
    """Loss and gradients of one batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        losses = loss(*tensors)
    losses.mean().backward()
    for tensor in tensors[:2]:
        tensor.grad = None


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(machine())
    print("\n| tokens, features, rows | precision | obvious: ms | ours: ms | times as fast |")
    print("|" + "---|" * 5)
    for size, width, rows in SIZES:
        vectors, table = torch.randn(rows, width), torch.randn(size, width) * width**-0.5
        tensors = vectors.requires_grad_(), table.requires_grad_(), torch.randint(size, (rows,))
        for is_mixed in (False, True):
            steps = {loss: partial(step, loss, tensors, is_mixed) for loss in (obvious, cross_entropy)}
            speeds = ratios(in_turns(steps, rounds), obvious)
            seconds, faster, least, most = speeds[cross_entropy]
            print(
                f"| {size:,}, {width}, {rows:,} | {'bf16' if is_mixed else 'float32'} "
                f"| {1000 * speeds[obvious][0]:.0f} | {1000 * seconds:.0f} "
                f"| {faster:.2f} ({least:.2f} to {most:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
