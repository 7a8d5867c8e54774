"""What does the energy loss cost, forward and backward?

    python benchmarks/energy.py

Our implementation, with and without the posterior integrated out, against the formula written the obvious
way: all differences of draws and targets in memory. Times are measured in turns, peak memory in separate
processes.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import DEVICE, in_turns, machine, peak_memory, ratios
from torch import Tensor

from calm.core.energy import energy_loss, energy_loss_to_gaussian
from calm.core.gaussian import DiagonalGaussian


def literal(draws_NPZ: Tensor, targets_MPZ: Tensor, alpha: float = 1.0) -> Tensor:
    """2/(NM) · sum |x - y|^alpha - 1/(N(N-1)) · sum |x - x'|^alpha, all differences at once."""
    num_draws = len(draws_NPZ)
    attraction = (draws_NPZ.unsqueeze(1) - targets_MPZ.unsqueeze(0)).norm(dim=-1) ** alpha
    repulsion = (draws_NPZ.unsqueeze(1) - draws_NPZ.unsqueeze(0)).norm(dim=-1) ** alpha
    return 2 * attraction.mean((0, 1)) - repulsion.sum((0, 1)) / (num_draws * (num_draws - 1))


def step(
    name: str, positions: int, size: int, num_draws: int, num_targets: int
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """A function that does a forward and a backward pass of one kind, and returns loss and gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_draws, positions, size, generator=generator)
    draws = hidden.to(DEVICE).requires_grad_()
    mean = torch.randn(positions, size, generator=generator).to(DEVICE)
    posterior = DiagonalGaussian(mean, torch.full_like(mean, -1.2))
    noise = torch.randn(num_targets, positions, size, generator=generator).to(DEVICE)

    def run() -> tuple[Tensor, Tensor | None]:
        draws.grad = None
        if name == "integrated":
            loss = energy_loss_to_gaussian(draws, posterior)
        else:
            targets = posterior.sample(num_targets, noise=noise)
            loss = (literal if name == "literal" else energy_loss)(draws, targets)
        loss.mean().backward()
        return loss.detach(), draws.grad

    return run


def check_same(literal_step: Callable[[], Any], our_step: Callable[[], Any]) -> Tensor:
    """The loss of a literal step; raises AssertionError if our step has another loss or gradient."""
    (loss, gradient), (ours, our_gradient) = literal_step(), our_step()
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-3, atol=1e-7)
    return loss


def main() -> None:
    """Print one line per implementation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sizes = arguments.positions, arguments.size, arguments.draws, arguments.targets
    names = ("literal", "ours", "integrated")
    print(f"{machine()}; P {sizes[0]}, Z {sizes[1]}, N {sizes[2]}, M {sizes[3]}, float32")
    steps = {name: step(name, *sizes) for name in names}
    loss = check_same(steps["literal"], steps["ours"])
    limit = steps["integrated"]()[0].mean() - loss.mean()
    print(
        f"ours equals the literal loss and gradient; integrated differs by {limit:.4f} of {loss.mean():.4f}"
    )
    table = ratios(in_turns(steps, arguments.rounds), "literal")
    memory = {name: peak_memory(step, name, *sizes) for name in names}
    print("| way | ms | times as fast | peak memory | share |\n|---|---|---|---|---|")
    for name, (seconds, ratio, least, most) in table.items():
        print(
            f"| {name} | {1000 * seconds:.0f} | {ratio:.1f} ({least:.1f} to {most:.1f}) | "
            f"{memory[name] / 2**20:.0f} MiB | 1/{memory['literal'] / max(memory[name], 1):.1f} |"
        )


if __name__ == "__main__":
    main()
