"""Logits over a whole vocabulary, computed in parts if they are too many for memory.

As in `calm.core.cross_entropy`, a table has one vector per token, and a bias may be added to its products.
Shapes: M rows (m of them in a part), X size of their vectors, V vocabulary, G groups of W tokens.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.core.cross_entropy import rows_at_once

_GROUP_SIZE = 64  # Tokens per group W, for draws that choose a group first.


def likeliest(vectors_MX: Tensor, table_VX: Tensor, bias_V: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The token with the highest logit in each row, the first if several tie, and its logit, (M,) each."""
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
        return draw_by_groups(F.linear(vectors_MX, table_VX, bias_V).float(), uniform_M)
    return draw_from_distributions(token_distributions(vectors_MX, table_VX, bias_V), uniform_M)


def draw_from_distributions(distributions: Iterable[Tensor], uniform_M: Tensor) -> tuple[Tensor, Tensor]:
    """`draw_tokens` from distributions, (m, V), a few rows at a time."""
    tokens, totals, start = [], [], 0
    for p_MV in distributions:
        sums_MV = p_MV.cumsum(-1)
        # Scaled by the last sum, which is not quite 1, so that no point lies beyond it.
        points_M1 = uniform_M[start : start + p_MV.shape[0], None].to(sums_MV.dtype) * sums_MV[:, -1:]
        tokens.append(torch.searchsorted(sums_MV, points_M1, right=True).squeeze(-1))
        totals.append(sums_MV[:, -1])
        start += p_MV.shape[0]
        tokens[-1].clamp_max_(p_MV.shape[1] - 1)
    return torch.cat(tokens), torch.cat(totals)


def draw_by_groups(logits_MV: Tensor, uniform_M: Tensor) -> tuple[Tensor, Tensor]:
    """`draw_tokens` from logits: first a group of tokens, then a token of that group.

    Compiled code computes sums over groups in fast loops, but a cumulative sum over the vocabulary is slow.
    The total returned here is that of the exponentials of the logits minus the highest logit.
    """
    vocab_size = logits_MV.shape[1]
    padded_MV = F.pad(logits_MV, (0, -vocab_size % _GROUP_SIZE), value=-torch.inf)
    logits_MGW = padded_MV.unflatten(-1, (-1, _GROUP_SIZE))
    highest_M1 = logits_MV.amax(-1, keepdim=True)
    sums_MG = (logits_MGW - highest_M1.unsqueeze(-1)).exp().sum(-1).cumsum(-1)
    total_M1 = sums_MG[:, -1:]
    point_M1 = uniform_M.unsqueeze(-1).to(sums_MG.dtype) * total_M1
    group_M1 = (sums_MG <= point_M1).sum(-1, keepdim=True).clamp_max(sums_MG.shape[1] - 1)
    before_M1 = torch.where(group_M1 > 0, sums_MG.gather(1, (group_M1 - 1).clamp_min(0)), 0)
    index_W = torch.arange(_GROUP_SIZE, device=logits_MV.device)
    weights_MW = (padded_MV.gather(1, group_M1 * _GROUP_SIZE + index_W) - highest_M1).exp()
    within_M = (before_M1 + weights_MW.cumsum(-1) <= point_M1).sum(-1)
    # The group's sum was rounded differently, so the point may lie beyond all of its tokens.
    within_M = within_M.minimum(torch.where(weights_MW > 0, index_W, 0).amax(-1))
    tokens_M = group_M1.squeeze(-1) * _GROUP_SIZE + within_M
    return tokens_M.clamp_max(vocab_size - 1), total_M1.squeeze(-1)


def token_distributions(
    vectors_MX: Tensor, table_VX: Tensor, bias_V: Tensor | None = None
) -> Iterator[Tensor]:
    """The distribution over the vocabulary of each row, (m, V), a few rows at a time."""
    for part_MX in in_parts(vectors_MX, len(table_VX)):
        yield F.linear(part_MX, table_VX, bias_V).float().softmax(-1)


def in_parts(rows: Tensor, numbers_per_row: int) -> Sequence[Tensor]:
    """Split rows so that what is computed from each part, such as its logits, fits in memory.

    While compiling there is a single part: the caller then limits the number of rows.

    Args:
        rows: Any tensor with the rows as its first axis.
        numbers_per_row: How many numbers are computed for a row.
    """
    return (rows,) if torch.compiler.is_compiling() else rows.split(rows_at_once(numbers_per_row))
