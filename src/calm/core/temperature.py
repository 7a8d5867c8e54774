"""Temperature sampling from draws alone (paper section 5).

Shapes: N draws of a pool, R rows (independent pools), K tokens of a chunk.
"""

import torch
from torch import Tensor


def inverse_temperature(temperature: float) -> int:
    """The whole number n with temperature = 1/n.

    Raises:
        ValueError: If the temperature is not 1, 1/2, 1/3, ...
    """
    n = round(1 / temperature) if temperature > 0 else 0
    if n < 1 or abs(temperature * n - 1) > 1e-3:
        raise ValueError(f"temperature must be 1, 1/2, 1/3, ... for pool sampling, got {temperature}.")
    return n


def sample_from_pool(
    pool_NRK: Tensor, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """Choose one chunk for each row so that its law tends to P^(1/T) as the pool grows, (R, K).

    With T = 1/n and counts c of the distinct chunks: for m = n, n-1, ..., 1, choose among the
    chunks with c >= m with weight C(c, m), and take the first m that has a candidate (the batch
    approximation of the paper). Chunks are compared exactly, by all K ids.

    Args:
        pool_NRK: Token ids of N independent draws of each row.
        temperature: T in {1, 1/2, 1/3, ...}.
        generator: Source of the one uniform number used for each row.

    Returns:
        Token ids of the chosen chunks.

    Raises:
        ValueError: If the temperature is not supported or the pool is smaller than n.
    """
    n = inverse_temperature(temperature)
    num_draws, num_rows, _ = pool_NRK.shape
    if num_draws < n:
        raise ValueError(
            f"a temperature of {temperature:g} needs a pool of at least {n} draws, got {num_draws}."
        )
    equal_RNN = (pool_NRK.transpose(0, 1).unsqueeze(1) == pool_NRK.transpose(0, 1).unsqueeze(2)).all(-1)
    count_RN = equal_RNN.sum(-1)
    # The draw that stands for its class is the first of the equal ones.
    earlier_NN = torch.ones_like(equal_RNN[0]).tril(-1)
    is_first_RN = ~(equal_RNN & earlier_NN).any(-1)
    size_R1 = count_RN.amax(-1, keepdim=True).clamp_max(n)
    log_weight_RN = _log_binomial(count_RN, size_R1)
    weight_RN = torch.where(is_first_RN & (count_RN >= size_R1), log_weight_RN, -torch.inf)
    cumulative_RN = (weight_RN - weight_RN.amax(-1, keepdim=True)).exp().cumsum(-1)
    uniform_R1 = torch.rand((num_rows, 1), generator=generator, device=pool_NRK.device, dtype=torch.float64)
    threshold_R1 = uniform_R1 * cumulative_RN[:, -1:]
    chosen_R1 = torch.searchsorted(cumulative_RN, threshold_R1, right=True).clamp_max(num_draws - 1)
    return pool_NRK[chosen_R1.squeeze(-1), torch.arange(num_rows, device=pool_NRK.device)]


def _log_binomial(count: Tensor, size: Tensor) -> Tensor:
    """log C(count, size) in float64; meaningless where count < size."""
    count, size = count.double(), size.double()
    rest = (count - size).clamp_min(0)
    return torch.lgamma(count + 1) - torch.lgamma(size + 1) - torch.lgamma(rest + 1)
