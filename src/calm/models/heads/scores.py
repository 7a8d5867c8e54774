"""Logits over a whole vocabulary, in parts if they are too many for memory.

As in `calm.core.cross_entropy`, a table has one vector per token, and a bias may be added to its products.
Shapes: M rows, X size of their vectors, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.core.cross_entropy import rows_at_once

_GROUP = 64  # Tokens per group, for draws in two steps.


def likeliest(vectors_MX: Tensor, table_VX: Tensor, bias_V: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The token with the highest logit in each row, (M,), the first of equals, and that logit, (M,)."""
    parts = in_parts(vectors_MX, len(table_VX))
    best = [F.linear(part_MX, table_VX, bias_V).float().max(-1) for part_MX in parts]
    return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])


def draw_tokens(
    vectors_MX: Tensor, table_VX: Tensor, uniform_M: Tensor, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A token from each row's distribution: where its cumulative sum first exceeds the uniform number, (M,).

    Also returns the last of these sums, (M,): 1 up to rounding, and not finite if the logits are not.
    """
    if torch.compiler.is_compiling():
        return draw_in_two_steps(F.linear(vectors_MX, table_VX, bias_V).float(), uniform_M)
    return draw_by_sums(token_distributions(vectors_MX, table_VX, bias_V), uniform_M)


def draw_by_sums(distributions: Iterable[Tensor], uniform_M: Tensor) -> tuple[Tensor, Tensor]:
    """`draw_tokens` from distributions, (m, V), a few rows at a time."""
    chosen, totals, first = [], [], 0
    for p_MV in distributions:
        sums_MV = p_MV.cumsum(-1)
        # Scaled by the last sum, which is not quite 1, so that no point lies beyond it.
        points_M1 = uniform_M[first : first + p_MV.shape[0], None].to(sums_MV.dtype) * sums_MV[:, -1:]
        chosen.append(torch.searchsorted(sums_MV, points_M1, right=True).squeeze(-1))
        totals.append(sums_MV[:, -1])
        first += p_MV.shape[0]
        chosen[-1].clamp_max_(p_MV.shape[1] - 1)
    return torch.cat(chosen), torch.cat(totals)


def draw_in_two_steps(scores_MV: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
    """`draw_tokens` from logits: first a group of tokens, then a token of that group.

    Compiled, sums over groups are fast loops, and a cumulative sum over the vocabulary is not. The last sum
    returned here is that of the exponentials of the logits minus the highest logit.
    """
    vocab_size = scores_MV.shape[1]
    padded_MV = F.pad(scores_MV, (0, -vocab_size % _GROUP), value=-torch.inf)
    scores_MGV = padded_MV.unflatten(-1, (-1, _GROUP))
    highest_M1 = scores_MV.amax(-1, keepdim=True)
    sums_MG = (scores_MGV - highest_M1.unsqueeze(-1)).exp().sum(-1).cumsum(-1)
    total_M1 = sums_MG[:, -1:]
    point_M1 = uniform_M.unsqueeze(-1).to(sums_MG.dtype) * total_M1
    group_M1 = (sums_MG <= point_M1).sum(-1, keepdim=True).clamp_max(sums_MG.shape[1] - 1)
    before_M1 = torch.where(group_M1 > 0, sums_MG.gather(1, (group_M1 - 1).clamp_min(0)), 0)
    place_W = torch.arange(_GROUP, device=scores_MV.device)
    weights_MW = (padded_MV.gather(1, group_M1 * _GROUP + place_W) - highest_M1).exp()
    within_M = (before_M1 + weights_MW.cumsum(-1) <= point_M1).sum(-1)
    # The group's sum was rounded differently, so the point may lie beyond all of its tokens.
    within_M = within_M.minimum(torch.where(weights_MW > 0, place_W, 0).amax(-1))
    tokens_M = group_M1.squeeze(-1) * _GROUP + within_M
    return tokens_M.clamp_max(vocab_size - 1), total_M1.squeeze(-1)


def token_distributions(
    vectors_MX: Tensor, table_VX: Tensor, bias_V: Tensor | None = None
) -> Iterator[Tensor]:
    """The distribution over the vocabulary of each row, (m, V), a few rows at a time."""
    for part_MX in in_parts(vectors_MX, len(table_VX)):
        yield F.linear(part_MX, table_VX, bias_V).float().softmax(-1)


def in_parts(of_rows: Tensor, num_scores: int) -> Sequence[Tensor]:
    """Split rows into parts whose logits fit in memory; one part while tracing, where the caller limits them.

    Args:
        of_rows: Rows.
        num_scores: How many numbers a row needs.
    """
    return (of_rows,) if torch.compiler.is_compiling() else of_rows.split(rows_at_once(num_scores))
