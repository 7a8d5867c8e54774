"""Flow matching from noise to code words, with the endpoint as a categorical distribution.

Each token v has a fixed code c_v, all of one length. On the straight path x_t = (1 - t) x_0 + t c_v from
standard normal noise, what a point says about the token is known in closed form,
    log N(x_t; t c_v, (1 - t)^2 I) = t / (1 - t)^2 <x_t, c_v> + (what is equal for all v),
so a network has to learn only the distribution of the token given everything else; their product is the
posterior p(v | x_t), and the velocity of the path is (E[c_v | x_t] - x_t) / (1 - t). Source of the parts:
score interpolation (Dieleman et al., arXiv 2211.15089), variational flow matching (Eijkelboom et al., arXiv
2406.04843); see docs/heads.md for the derivation. Shapes: K tokens per chunk, d size of a code, Z = K·d.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Endpoint = Callable[[Tensor, float], Tensor]
"""endpoint(x, t): mean of the data at the end of the paths that pass x at time t, of the shape of x."""

_ALL_TOLD_APART = 5.0  # Times log V.
_LARGEST_WEIGHT = 100.0  # Nothing is in doubt by then, and float32 holds the scores.


def evidence(points_KD: Tensor, time: Tensor) -> Tensor:
    """Points scaled so that their products with the codes are log-likelihoods of tokens, up to a constant.

    Args:
        points_KD: x_t of each token, (..., K, d).
        time: t in [0, 1) of each chunk, (...), or one for all, ().
    """
    weight = (time / (1 - time).clamp_min(1e-6).square()).clamp_max(_LARGEST_WEIGHT)
    return points_KD * weight[..., None, None]


def last_time(code_size: int, vocab_size: int) -> float:
    """A time at which hardly any token is in doubt, whatever the network says of it.

    Two codes are told apart by d·(t/(1 - t))² nats in the mean; to be told from all V takes a few log V.
    """
    return _time_of(_ALL_TOLD_APART * math.log(vocab_size), code_size)


def times_of_steps(num_steps: int, code_size: int, vocab_size: int) -> list[float]:
    """The times at which the endpoint is asked for, from 0 on.

    They lie close where tokens are decided, and reach further with more steps; found with an oracle in the
    network's place (docs/log.md).

    Raises:
        ValueError: If there are fewer than two: a single step ends at the mean of all codes.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, got {num_steps}.")
    most = min(1.5 + num_steps / 8, _ALL_TOLD_APART) * math.log(vocab_size)
    shares = (step / (num_steps - 1) for step in range(num_steps))
    return [_time_of(share**1.5 * most, code_size) for share in shares]


def _time_of(nats: float, code_size: int) -> float:
    """The time at which two codes are told apart by so many nats: d·(t/(1 - t))² = nats."""
    ratio = math.sqrt(nats / code_size)
    return ratio / (1 + ratio)


def follow_endpoints(endpoint: Endpoint, start: Tensor, times: list[float]) -> Tensor:
    """Go from noise to data with one call of the endpoint at each time; the last call gives the end.

    Between two calls the endpoint is taken as constant, for which the path is straight: Euler's step.

    Args:
        endpoint: Mean of the data at the end of the paths through a point.
        start: x_0.
        times: Rising times, the first 0.
    """
    x = start
    for now, after in zip(times, [*times[1:], 1.0], strict=True):
        x = torch.lerp(x, endpoint(x, now), (after - now) / (1 - now))
    return x
