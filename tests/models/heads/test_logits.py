"""Draws from logits over a whole vocabulary: as they are traced for compilation, against eager ones."""

import pytest
import torch

from calm.models.heads.logits import draw_tokens


@pytest.fixture(scope="module")
def traced():
    """`draw_tokens` as it is traced for compilation, without compiling it."""
    return torch.compile(draw_tokens, backend="eager", dynamic=True)


@pytest.mark.parametrize("vocab_size", [3, 64, 200, 4096])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_traced_draws_match_eager_draws(vocab_size, spread, traced):
    torch.manual_seed(vocab_size)
    table = spread * torch.randn(vocab_size, 8)
    vectors, uniform = torch.randn(500, 8), torch.rand(500)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])  # The smallest and the largest possible number.
    plain, sums = draw_tokens(vectors, table, uniform)
    tokens, totals = traced(vectors, table, uniform)
    # Sums in another order round differently: a number may lie on the other side of a border.
    assert (tokens == plain).float().mean() >= 0.995
    assert (tokens - plain).abs().max() <= 1 or spread > 1
    assert sums.isfinite().all() and totals.isfinite().all()


def test_tokens_without_probability_are_not_drawn(traced):
    table = torch.full((130, 1), -1e30)
    table[[0, 63, 64, 129], 0] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    tokens, _ = traced(torch.ones(4000, 1), table, (torch.arange(4000) + 0.5) / 4000)
    assert tokens.bincount(minlength=130)[[0, 63, 64, 129]].tolist() == [400, 800, 1200, 1600]


def test_rounding_at_the_end_of_a_group_draws_no_token_without_probability(traced):
    """A group is summed as a whole and then token by token, which may give less."""
    logits = 3 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 63::64] = -300.0
    groups = torch.nn.functional.pad(logits, (0, -1000 % 64), value=-torch.inf).view(-1, 64)
    sums = (groups - logits.max()).exp().sum(-1).cumsum(-1)
    borders = [sums[:-1] / sums[-1]]
    for direction in (0.0, 1.0):
        near = borders[0]
        for _ in range(4):
            near = near.nextafter(torch.tensor(direction))
            borders.append(near)
    uniform = torch.cat(borders)
    tokens, _ = traced(torch.ones(len(uniform), 1), logits.T, uniform)
    assert not (tokens % 64 == 63).any()


def test_totals_are_not_finite_if_logits_are_not(traced):
    vectors = torch.tensor([[1.0], [torch.nan], [torch.inf]])
    _, totals = traced(vectors, torch.ones(70, 1), torch.rand(3))
    assert totals.isfinite().tolist() == [True, False, False]
