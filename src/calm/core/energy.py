"""The energy loss: a strictly proper score that only needs samples (paper section 3.3).

Shapes: N head draws, M posterior draws, P positions, Z latent size.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from calm.core.gaussian import DiagonalGaussian

# Squared distances at or below this count as zero. This keeps the gradient of |d|^alpha finite where
# two draws coincide, as all draws do at initialization (the head's last layer starts at zero).
_ZERO_DISTANCE_SQUARED = 1e-12

# Target elements processed at once: few enough to stay in a CPU's cache, enough to saturate a GPU.
_AT_ONCE = 2**20
_AT_ONCE_ON_GPU = 2**26


def energy_loss(draws_NPZ: Tensor, targets_MPZ: Tensor, alpha: float = 1.0) -> Tensor:
    """Monte Carlo energy loss of each position, shape (P,).

    2/(N·M) · sum_{n,m} |x_n - y_m|^alpha  -  1/(N(N-1)) · sum_{n != k} |x_n - x_k|^alpha

    Its expectation is lowest when the draws follow the distribution of the targets, for any alpha in (0, 2).

    Args:
        draws_NPZ: Draws x of the head, N >= 2.
        targets_MPZ: Draws y of the autoencoder's posterior, M >= 1.
        alpha: Exponent of the distance, in (0, 2).

    Raises:
        ValueError: If alpha or N is out of range.
    """
    _check(draws_NPZ, alpha)
    with torch.autocast(draws_NPZ.device.type, enabled=False):
        x_NPZ = draws_NPZ.float()
        return 2 * _mean_distance_to(x_NPZ, targets_MPZ, alpha) - _mean_distance_between(x_NPZ, alpha)


def energy_loss_to_gaussian(draws_NPZ: Tensor, posterior_PZ: DiagonalGaussian, alpha: float = 1.0) -> Tensor:
    """Energy loss with the posterior draws integrated out (M = infinity), shape (P,).

    Args:
        draws_NPZ: Draws x of the head, N >= 2.
        posterior_PZ: Distribution of the targets.
        alpha: Exponent of the distance, in (0, 2).

    Raises:
        ValueError: If alpha or N is out of range.
    """
    _check(draws_NPZ, alpha)
    with torch.autocast(draws_NPZ.device.type, enabled=False):
        x_NPZ = draws_NPZ.float()
        attraction_P = expected_distance(x_NPZ, posterior_PZ, alpha).mean(0)
        return 2 * attraction_P - _mean_distance_between(x_NPZ, alpha)


def expected_distance(points_NPZ: Tensor, gaussian_PZ: DiagonalGaussian, alpha: float = 1.0) -> Tensor:
    """E|x - y|^alpha for y ~ N(mu, diag v), to second order, shape (N, P).

    With Q = |x - y|^2: E Q = S = |x - mu|^2 + sum v, Var Q = 2 sum v^2 + 4 sum v (x - mu)^2, and the
    expansion of Q^(alpha/2) around S gives S^(alpha/2) (1 + alpha (alpha - 2)/8 · Var Q / S^2).
    With a = alpha/2 and d = max v / S, at most 1/Z if all variances are equal, the error relative to S^a is
    at most 8 (1 - a) (2 - a) (3 - a) d^2 (1 + 4 d) (derived in docs/maths.md).
    For variances spread over a factor of 10 it is 0.5% at Z = 8, 0.03% at Z = 32 and 0.002% at Z = 128.

    Args:
        points_NPZ: Points x.
        gaussian_PZ: Distribution of y.
        alpha: Exponent of the distance, in (0, 2).
    """
    variance_PZ = gaussian_PZ.variance.to(points_NPZ.dtype)
    squared_NPZ = (points_NPZ - gaussian_PZ.mean.to(points_NPZ.dtype)).square()
    mean_NP = squared_NPZ.sum(-1) + variance_PZ.sum(-1)
    var_NP = 2 * variance_PZ.square().sum(-1) + 4 * (squared_NPZ * variance_PZ).sum(-1)
    mean_NP = mean_NP.clamp_min(_ZERO_DISTANCE_SQUARED)
    correction_NP = 1 + alpha * (alpha - 2) / 8 * var_NP / mean_NP.square()
    return _power(mean_NP, alpha) * correction_NP


def _check(draws_NPZ: Tensor, alpha: float) -> None:
    if not 0 < alpha < 2:
        raise ValueError(f"alpha must lie in (0, 2) for the energy loss to be proper, got {alpha}.")
    if draws_NPZ.shape[0] < 2:
        raise ValueError(f"the energy loss needs at least 2 draws, got {draws_NPZ.shape[0]}.")


def _mean_distance_between(draws_NPZ: Tensor, alpha: float) -> Tensor:
    """Mean of |x_n - x_k|^alpha over the pairs n < k, shape (P,)."""
    # There are few pairs, so take explicit differences: no self-distances, and no cancellation between
    # draws that are close together.
    first, second = zip(*itertools.combinations(range(draws_NPZ.shape[0]), 2), strict=True)
    differences = draws_NPZ[list(first)] - draws_NPZ[list(second)]
    return _power(differences.square().sum(-1), alpha).mean(0)


def _mean_distance_to(x_NPZ: Tensor, y_MPZ: Tensor, alpha: float) -> Tensor:
    """Mean of |x_n - y_m|^alpha over all n and m, shape (P,)."""
    # The fused version has no gradient w.r.t. the targets, which are not usually trained, and its loop would
    # make torch.compile recompile for every number of positions.
    if y_MPZ.requires_grad or torch.compiler.is_compiling():
        return _distances(x_NPZ.transpose(0, 1), y_MPZ.to(x_NPZ.dtype).transpose(0, 1), alpha).mean((1, 2))
    value_P: Tensor = _MeanDistanceTo.apply(x_NPZ, y_MPZ, alpha)
    return value_P


class _MeanDistanceTo(torch.autograd.Function):
    """Mean distance and its gradient w.r.t. x in one pass, a few positions at a time.

    The (N, M, P, Z) differences are never materialized, and only one part of the targets is copied at a time.
    """

    @staticmethod
    def forward(ctx: Any, x_NPZ: Tensor, y_MPZ: Tensor, alpha: float) -> Tensor:
        (num_draws, num_positions, size), num_targets = x_NPZ.shape, len(y_MPZ)
        elements_at_once = _AT_ONCE if x_NPZ.is_cpu else _AT_ONCE_ON_GPU
        step = max(1, elements_at_once // (num_targets * size))
        value_P = x_NPZ.new_empty(num_positions)
        slope_NPZ = torch.empty_like(x_NPZ) if ctx.needs_input_grad[0] else None
        for start in range(0, num_positions, step):
            part = slice(start, start + step)
            x_PNZ, y_PMZ = _centred(x_NPZ[:, part].transpose(0, 1), y_MPZ[:, part].transpose(0, 1))
            squared_PNM = _squared_distances(x_PNZ, y_PMZ)
            power_PNM = _power(squared_PNM, alpha)
            value_P[part] = power_PNM.mean((1, 2))
            if slope_NPZ is not None:
                # d|x - y|^alpha / dx = alpha |x - y|^(alpha - 2) (x - y); zero where they coincide.
                safe_PNM = squared_PNM.clamp_min(_ZERO_DISTANCE_SQUARED)
                weight_PNM = power_PNM / safe_PNM * (alpha / (num_draws * num_targets))
                pull_PNZ = torch.baddbmm(
                    weight_PNM.sum(-1, keepdim=True) * x_PNZ, weight_PNM, y_PMZ, alpha=-1
                )
                slope_NPZ[:, part] = pull_PNZ.transpose(0, 1)
        ctx.save_for_backward(slope_NPZ)
        return value_P

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():  # With create_graph the slope would be treated as a constant.
            raise RuntimeError(
                "the energy loss can only be differentiated once; use targets with requires_grad."
            )
        (slope_NPZ,) = ctx.saved_tensors
        return None if slope_NPZ is None else slope_NPZ * gradients[0].unsqueeze(-1), None, None


def _centred(x_PNZ: Tensor, y_PMZ: Tensor) -> tuple[Tensor, Tensor]:
    """Shift both by the mean of y, which keeps distances and makes the expanded square accurate."""
    y_PMZ = y_PMZ.to(x_PNZ.dtype)
    centre_P1Z = y_PMZ.mean(1, keepdim=True)
    return x_PNZ - centre_P1Z, y_PMZ - centre_P1Z


def _distances(x_PNZ: Tensor, y_PMZ: Tensor, alpha: float) -> Tensor:
    """|x - y|^alpha, shape (P, N, M)."""
    return _power(_squared_distances(*_centred(x_PNZ, y_PMZ)), alpha)


def _squared_distances(x_PNZ: Tensor, y_PMZ: Tensor) -> Tensor:
    """|x - y|^2 with one matrix product, shape (P, N, M)."""
    norms = x_PNZ.square().sum(-1, keepdim=True) + y_PMZ.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(norms, x_PNZ, y_PMZ.transpose(1, 2), alpha=-2)


def _power(squared: Tensor, alpha: float) -> Tensor:
    """|d|^alpha from |d|^2; value and gradient are zero where d is."""
    is_positive = squared > _ZERO_DISTANCE_SQUARED
    safe = torch.where(is_positive, squared, torch.ones_like(squared))
    power = safe.sqrt() if alpha == 1 else safe.pow(alpha / 2)
    return torch.where(is_positive, power, torch.zeros_like(power))
