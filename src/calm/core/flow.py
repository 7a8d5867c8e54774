"""Flow matching on the straight path from noise to data: x_t = (1 - t) x_0 + t x_1 (paper section 3.2).

Time runs from 0 (standard normal noise) to 1 (data). Shapes: N draws, P positions, Z latent size.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Solver = Literal["euler", "midpoint", "heun"]

CALLS_PER_STEP = {"euler": 1, "midpoint": 2, "heun": 2}
"""Velocity evaluations per step of each solver."""


def straight_path(noise_NPZ: Tensor, data_NPZ: Tensor, time_NP: Tensor) -> tuple[Tensor, Tensor]:
    """Points x_t on the paths from noise to data, and their velocity x_1 - x_0, both (N, P, Z)."""
    velocity_NPZ = data_NPZ - noise_NPZ
    return noise_NPZ + time_NP.unsqueeze(-1) * velocity_NPZ, velocity_NPZ


def solve(
    velocity: Callable[[Tensor, float], Tensor], start: Tensor, num_steps: int, solver: Solver = "midpoint"
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 0 to t = 1 in equal steps.

    Args:
        velocity: Velocity at a point of any shape and a time in [0, 1].
        start: x_0.
        num_steps: Number of steps.
        solver: "euler" (first order, one call per step), "midpoint" or "heun" (second order, two calls).

    Returns:
        x_1, in the shape of `start`.
    """
    size, x = 1 / num_steps, start
    for step in range(num_steps):
        time = step / num_steps
        first = velocity(x, time)
        if solver == "euler":
            x = x + size * first
        elif solver == "midpoint":
            x = x + size * velocity(x + size / 2 * first, (step + 0.5) / num_steps)
        else:
            second = velocity(x + size * first, (step + 1) / num_steps)
            x = x + size / 2 * (first + second)
    return x
