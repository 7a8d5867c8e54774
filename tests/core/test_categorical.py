"""Flow matching to codes of tokens, against densities and distributions that are known in closed form."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.distributions import Normal
from torch.testing import assert_close

from calm.core.categorical import evidence, follow_endpoints, last_time, times_of_steps

SIZE = 6  # Of a code.
DRAWS = 20_000


def codes_of(number: int) -> torch.Tensor:
    codes = torch.randn(number, SIZE, generator=torch.Generator().manual_seed(3)).double()
    return F.normalize(codes, dim=-1) * SIZE**0.5


def noise_of(tokens: int) -> torch.Tensor:
    return torch.randn(DRAWS, tokens * SIZE, generator=torch.Generator().manual_seed(4)).double()


def nearest_tokens(points: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Tokens of the nearest codes, (N, K)."""
    return (points.unflatten(-1, (-1, SIZE)) @ codes.T).argmax(-1)


def exact_endpoint(distribution: torch.Tensor, codes: torch.Tensor, temperature: float = 1.0):
    """The mean code of each token under the true posterior of a joint distribution, by enumeration."""
    size = len(codes)
    chunks = torch.tensor(list(itertools.product(range(size), repeat=distribution.ndim)))
    log_prior = distribution.flatten().log() / temperature

    def endpoint(points: torch.Tensor, time: float) -> torch.Tensor:
        logits = evidence(points.unflatten(-1, (-1, SIZE)), torch.tensor(time)) @ codes.T  # (N, K, V)
        log_chunks = log_prior + sum(
            logits[:, position, chunks[:, position]] for position in range(distribution.ndim)
        )
        return log_chunks.softmax(-1) @ codes[chunks].flatten(1)

    return endpoint


def test_evidence_is_the_log_likelihood_up_to_a_constant():
    codes, time = codes_of(7), torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64)
    points = torch.randn(3, 1, SIZE, dtype=torch.float64)
    logits = (evidence(points, time) @ codes.T)[:, 0]
    for row, t in enumerate(time):
        density = Normal(t * codes, 1 - t).log_prob(points[row]).sum(-1)
        assert_close(logits[row] - logits[row, 0], density - density[0])


def test_evidence_stays_finite_at_the_end():
    assert evidence(torch.randn(2, 3, SIZE), torch.tensor([1.0, 0.999999])).isfinite().all()


def even_times(steps: int, last: float = 0.9) -> list[float]:
    return [last * step / (steps - 1) for step in range(steps)]


def test_times_rise_from_zero_to_where_tokens_are_distinguishable():
    for steps in (2, 4, 60):
        times = times_of_steps(steps, 16, 4096)
        assert times[0] == 0 and times == sorted(times) and len(times) == steps
        assert times[-1] <= last_time(16, 4096) < 1
    # For d = 16, where two codes are 5 log V nats apart.
    assert 16 * (last_time(16, 4096) / (1 - last_time(16, 4096))) ** 2 == pytest.approx(5 * math.log(4096))
    assert times_of_steps(200, 16, 4096)[-1] == last_time(16, 4096)
    assert last_time(4, 4096) > last_time(16, 4096)
    with pytest.raises(ValueError, match="num_steps must be at least 2, got 1"):
        times_of_steps(1, 16, 4096)


@pytest.mark.parametrize("steps", [2, 7])
def test_certain_endpoint_is_reached_in_any_number_of_steps(steps):
    end = torch.randn(3, SIZE)
    reached = follow_endpoints(lambda x, t: end, torch.randn(3, SIZE), even_times(steps))
    assert_close(reached, end)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_single_token_has_the_tempered_distribution(temperature):
    """Sharpening only the prior, and not the evidence, gives the tempered distribution."""
    codes, distribution = codes_of(5), torch.tensor([0.45, 0.3, 0.15, 0.07, 0.03]).double()
    drawn = follow_endpoints(exact_endpoint(distribution, codes, temperature), noise_of(1), even_times(120))
    counts = torch.bincount(nearest_tokens(drawn, codes)[:, 0], minlength=5)
    expected = distribution ** (1 / temperature) / (distribution ** (1 / temperature)).sum() * DRAWS
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_dependent_tokens_have_their_joint_distribution():
    """A step uses only the marginal of each token, and yet draws follow the joint distribution."""
    codes = codes_of(3)
    distribution = torch.tensor([[0.3, 0.01, 0.04], [0.02, 0.25, 0.03], [0.05, 0.1, 0.2]]).double()
    drawn = follow_endpoints(exact_endpoint(distribution, codes), noise_of(2), even_times(120))
    first, second = nearest_tokens(drawn, codes).T
    counts = torch.bincount(3 * first + second, minlength=9)
    assert stats.chisquare(counts, distribution.flatten() / distribution.sum() * DRAWS).pvalue > 1e-3


def test_four_steps_are_near_the_distribution_of_a_large_vocabulary():
    """Total variation distance of a skewed distribution, binned by rank; sampling noise is below 0.02."""
    size, draws = 2048, 4000
    codes = F.normalize(torch.randn(size, 16, generator=torch.Generator().manual_seed(5)), dim=-1) * 4
    distribution = 1 / torch.arange(1, size + 1)
    distribution = distribution / distribution.sum()

    def endpoint(points: torch.Tensor, time: float) -> torch.Tensor:
        logits = evidence(points.unsqueeze(1), torch.tensor(time))[:, 0] @ codes.T
        return (logits + distribution.log()).softmax(-1) @ codes

    rank = torch.bucketize(torch.arange(size), torch.tensor([1, 4, 16, 64, 256, 1024]))
    expected = torch.zeros(7).index_add(0, rank, distribution)
    distance = {}
    for steps in (2, 4, 16):
        noise = torch.randn(draws, 16, generator=torch.Generator().manual_seed(6))
        drawn = follow_endpoints(endpoint, noise, times_of_steps(steps, 16, size))
        share = torch.bincount(rank[(drawn @ codes.T).argmax(-1)], minlength=7) / draws
        distance[steps] = (share - expected).abs().sum().item() / 2
    assert distance[16] < 0.03 and distance[4] < 0.06 and distance[2] < 0.2, distance
    assert distance[2] > distance[4] > distance[16] / 2
