"""Flow matching from noise to code words, with a categorical distribution over endpoints.

Each token v has a fixed code c_v, all of the same norm. On the straight path x_t = (1 - t) x_0 + t c_v from
standard normal noise, the evidence that a point gives about the token has a closed form,
    log N(x_t; t c_v, (1 - t)^2 I) = t / (1 - t)^2 <x_t, c_v> + (terms equal for all v),
so the network only has to learn the distribution of the token given everything else; their product is the
posterior p(v | x_t), and the velocity of the path is (E[c_v | x_t] - x_t) / (1 - t). Based on
score interpolation (Dieleman et al., arXiv 2211.15089) and variational flow matching (Eijkelboom et al.,
arXiv 2406.04843); derivation in docs/heads.md. Shapes: K tokens per chunk, d size of a code, Z = K·d.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Endpoint = Callable[[Tensor, float], Tensor]
"""endpoint(x, t): mean of the data at the end of the paths through x at time t, in the shape of x."""

_CERTAINTY = 5.0  # Nats that separate a code from all others, in units of log V.
_LARGEST_WEIGHT = 100.0  # By then the token is certain, and the logits still fit in float32.


def evidence(points_KD: Tensor, time: Tensor) -> Tensor:
    """Scale points so that their dot products with the codes are token log-likelihoods, up to a constant.

    Args:
        points_KD: x_t of each token, (..., K, d).
        time: t in [0, 1), one per chunk, (...), or one for all, ().
    """
    weight = (time / (1 - time).clamp_min(1e-6).square()).clamp_max(_LARGEST_WEIGHT)
    return points_KD * weight[..., None, None]


def last_time(code_size: int, vocab_size: int) -> float:
    """A time by which nearly every token is determined, whatever the network predicts.

    On average, d·(t/(1 - t))² nats separate two codes; separating one from all V takes a few log V.
    """
    return _time_of(_CERTAINTY * math.log(vocab_size), code_size)


def times_of_steps(num_steps: int, code_size: int, vocab_size: int) -> list[float]:
    """The times at which the endpoint is evaluated, starting at 0.

    They are dense where tokens are decided, and reach later times with more steps; tuned with the true
    posterior in place of the network (docs/log.md).

    Raises:
        ValueError: If `num_steps` is below 2: a single step ends at the mean of all codes.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, got {num_steps}.")
    max_nats = min(1.5 + num_steps / 8, _CERTAINTY) * math.log(vocab_size)
    fractions = (step / (num_steps - 1) for step in range(num_steps))
    return [_time_of(fraction**1.5 * max_nats, code_size) for fraction in fractions]


def _time_of(nats: float, code_size: int) -> float:
    """The time at which this many nats separate two codes: d·(t/(1 - t))² = nats."""
    ratio = math.sqrt(nats / code_size)
    return ratio / (1 + ratio)


def follow_endpoints(endpoint: Endpoint, start: Tensor, times: list[float]) -> Tensor:
    """Integrate from noise to data with one endpoint call at each time; the last call gives the result.

    Between two calls the endpoint is held constant, so the path is straight: an Euler step.

    Args:
        endpoint: Mean of the data at the end of the paths through a point.
        start: x_0.
        times: Increasing times, starting at 0.
    """
    x = start
    for now, after in zip(times, [*times[1:], 1.0], strict=True):
        x = torch.lerp(x, endpoint(x, now), (after - now) / (1 - now))
    return x
