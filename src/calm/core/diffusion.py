"""Diffusion with a cosine schedule, noise prediction and a learned variance (paper section 3.2; Nichol and
Dhariwal, "Improved denoising diffusion probabilistic models", 2021).

Step t = 0..T-1 adds noise: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a_t falling from nearly 1 to nearly 0.
Shapes: N draws, P positions, Z latent size.
"""

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

DiffusionSampler = Literal["ancestral", "ddim", "dpm"]

_LARGEST_BETA = 0.999
_COSINE_OFFSET = 0.008

Number = Any  # A float, or a tensor of them.


class Coefficients(NamedTuple):
    """Coefficients of a step: numbers for one step, or tensors (..., 1) for many.

    Args:
        signal: sqrt(a_t).
        noise: sqrt(1 - a_t).
        data_weight: Weight of x_0 in the mean of x_{t-1} given x_t and x_0.
        point_weight: Weight of x_t in that mean.
        min_log_variance: Logarithm of the smallest variance, that of x_{t-1} given x_t and x_0 (at t = 0,
            where it is zero, that of t = 1).
        max_log_variance: Logarithm of the largest variance, that of the forward step.
    """

    signal: Number
    noise: Number
    data_weight: Number
    point_weight: Number
    min_log_variance: Number
    max_log_variance: Number

    @staticmethod
    def look_up(table: Tensor, steps: Tensor) -> "Coefficients":
        """Look up the coefficients of many steps, (...), in the table of a schedule."""
        return Coefficients(*table.to(steps.device)[steps].unsqueeze(-2).unbind(-1))


@dataclass(frozen=True)
class NoiseSchedule:
    """Some or all steps of a diffusion.

    Args:
        signals: a_t of each step.
        steps: Index of each step among all T, as passed to the network.
    """

    signals: tuple[float, ...]
    steps: tuple[int, ...]

    @staticmethod
    def cosine(num_timesteps: int) -> "NoiseSchedule":
        """a_t = cos²((t/T + s)/(1 + s) · π/2), where no step loses more than 99.9% of the signal."""

        def signal(time: float) -> float:
            return math.cos((time + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2

        ratios = (  # a_t / a_{t-1}
            1 - min(1 - signal((t + 1) / num_timesteps) / signal(t / num_timesteps), _LARGEST_BETA)
            for t in range(num_timesteps)
        )
        return NoiseSchedule(tuple(itertools.accumulate(ratios, operator.mul)), tuple(range(num_timesteps)))

    def with_signal(self, min_signal: float) -> "NoiseSchedule":
        """The first steps, as long as the signal a_t is at least `min_signal`."""
        count = sum(signal >= min_signal for signal in self.signals)
        return NoiseSchedule(self.signals[:count], self.steps[:count])

    def respaced(self, num_steps: int) -> "NoiseSchedule":
        """The same diffusion with fewer steps, evenly spaced from the first to the last.

        Raises:
            ValueError: If `num_steps` is not between 1 and the number of steps.
        """
        last = len(self.steps) - 1
        if not 1 <= num_steps <= last + 1:
            raise ValueError(f"the number of steps must be between 1 and {last + 1}, got {num_steps}.")
        indices = [round(i * last / (num_steps - 1)) for i in range(num_steps)] if num_steps > 1 else [last]
        return NoiseSchedule(tuple(self.signals[i] for i in indices), tuple(self.steps[i] for i in indices))

    def at(self, index: int) -> Coefficients:
        """Coefficients of the step at an index."""
        now = self.signals[index]
        before = self.signals[index - 1] if index else 1.0
        beta = 1 - now / before
        # The reverse of the first step has zero variance; a likelihood needs some, so use the second step's.
        min_variance = self._variance(max(index, 1)) if len(self.signals) > 1 else beta
        return Coefficients(
            signal=math.sqrt(now),
            noise=math.sqrt(1 - now),
            data_weight=beta * math.sqrt(before) / (1 - now),
            point_weight=(1 - before) * math.sqrt(1 - beta) / (1 - now),
            min_log_variance=math.log(min_variance),
            max_log_variance=math.log(beta),
        )

    def table(self) -> Tensor:
        """Coefficients of all steps, in order, (S, 6)."""
        # Built from Python numbers, so that no ambient mode or default device affects it.
        rows = [list(self.at(index)) for index in range(len(self.signals))]
        with torch.inference_mode(False):
            return torch.tensor(rows, dtype=torch.float32, device="cpu")

    def _variance(self, index: int) -> float:
        """Variance of x_{t-1} given x_t and x_0."""
        now, before = self.signals[index], self.signals[index - 1]
        return (1 - now / before) * (1 - before) / (1 - now)


def hybrid_loss(
    step: Coefficients,
    is_first_NP: Tensor,
    data_NPZ: Tensor,
    noise_NPZ: Tensor,
    point_NPZ: Tensor,
    predicted_NPZ: Tensor,
    fraction_NPZ: Tensor,
    *,
    as_image: bool = False,
) -> Tensor:
    """Squared error of the predicted noise, plus a likelihood bound that trains the variance, (N, P).

    Both are means over Z; the bound is in bits, and its gradient only reaches the variance. It is weighted as
    one step's term of the full bound for any T, as in the released code.

    Args:
        step: Coefficients of the steps, (N, P, 1).
        is_first_NP: Whether the step is the first, t = 0, whose term is a likelihood instead of a divergence.
        data_NPZ: x_0.
        noise_NPZ: The noise that was added.
        point_NPZ: x_t.
        predicted_NPZ: The predicted noise.
        fraction_NPZ: The predicted log-variance: -1 is the smallest, 1 the largest.
        as_image: At t = 0, use the likelihood of an 8-bit image's bins, as the released code does although
            latents are not images. Otherwise use the density of the latent.
    """
    squared_NP = (predicted_NPZ - noise_NPZ).square().mean(-1)
    predicted_data_NPZ = data_from_noise(step, point_NPZ, predicted_NPZ.detach())
    mean_NPZ = step.data_weight * predicted_data_NPZ + step.point_weight * point_NPZ
    true_mean_NPZ = step.data_weight * data_NPZ + step.point_weight * point_NPZ
    log_variance_NPZ = log_variance(step, fraction_NPZ)
    divergence_NPZ = 0.5 * (
        log_variance_NPZ
        - step.min_log_variance
        - 1
        + (step.min_log_variance - log_variance_NPZ).exp()
        + (true_mean_NPZ - mean_NPZ).square() * (-log_variance_NPZ).exp()
    )
    if as_image:
        nll_NPZ = -_log_mass_of_bin(data_NPZ, mean_NPZ, log_variance_NPZ)
    else:
        squared_z_NPZ = (data_NPZ - mean_NPZ).square() * (-log_variance_NPZ).exp()
        nll_NPZ = 0.5 * (math.log(2 * math.pi) + log_variance_NPZ + squared_z_NPZ)
    bound_NPZ = torch.where(is_first_NP.unsqueeze(-1), nll_NPZ, divergence_NPZ)
    return squared_NP + bound_NPZ.mean(-1) / math.log(2)


def data_from_noise(step: Coefficients, point: Tensor, noise: Tensor) -> Tensor:
    """Recover x_0 from x_t and its noise."""
    return (point - step.noise * noise) / step.signal


def log_variance(step: Coefficients, fraction: Tensor) -> Tensor:
    """The learned log-variance, from the smallest (fraction -1) to the largest (1)."""
    weight = (fraction + 1) / 2
    return weight * step.max_log_variance + (1 - weight) * step.min_log_variance


def sample(
    schedule: NoiseSchedule,
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    start: Tensor,
    sampler: DiffusionSampler,
    step_noise: Callable[[int], Tensor],
    bound: float | None = None,
) -> Tensor:
    """Sample data from noise, with one network call per step of the schedule.

    Args:
        schedule: The steps to take, from the last to the first.
        predict: (x_t, index of the step) -> predicted noise and variance fraction, in the shape of x_t.
        start: Standard normal noise of any shape.
        sampler: "ancestral" samples each x_{t-1} with the learned variance; the others are deterministic:
            "ddim" (Song et al., arXiv 2010.02502; first order) and "dpm", the second-order multistep
            DPM-Solver++ (Lu et al., arXiv 2211.01095).
        step_noise: s -> noise of the s-th step taken; called only by the ancestral sampler, for all steps
            but the last.
        bound: Clamp predicted data to ± bound, since at high noise levels the error of the predicted noise
            is divided by nearly zero.
    """
    x, previous = start, None
    for num_taken, index in enumerate(reversed(range(len(schedule.steps)))):
        now = schedule.at(index)
        noise, fraction = predict(x, schedule.steps[index])
        data = data_from_noise(now, x, noise)
        if bound is not None:
            data = data.clamp(-bound, bound)
        if sampler == "ancestral":
            mean = now.data_weight * data + now.point_weight * x
            if index == 0:
                return mean
            x = mean + (0.5 * log_variance(now, fraction)).exp() * step_noise(num_taken)
            continue
        if index == 0:
            return data
        after = schedule.at(index - 1)
        width = _log_ratio(after) - _log_ratio(now)
        slope = data
        # The last step is much wider than the one before: of second order, it would overshoot.
        if sampler == "dpm" and previous is not None and index > 1:
            previous_data, previous_width = previous
            slope = data + width / (2 * previous_width) * (data - previous_data)
        x = after.noise / now.noise * x - after.signal * math.expm1(-width) * slope
        previous = data, width
    return x


def _log_ratio(step: Coefficients) -> float:
    """Half the logarithm of the signal-to-noise ratio of one step."""
    return math.log(step.signal / step.noise)


def _log_mass_of_bin(data: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Logarithm of a Gaussian's mass in the bin of width 2/255 around a pixel in [-1, 1]."""
    centred, precision = data - mean, (-0.5 * log_variance).exp()
    below = _approximate_normal_cdf(precision * (centred - 1 / 255))
    above = _approximate_normal_cdf(precision * (centred + 1 / 255))
    mass = torch.where(data < -0.999, above, torch.where(data > 0.999, 1 - below, above - below))
    return mass.clamp_min(1e-12).log()


def _approximate_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
