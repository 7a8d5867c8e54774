"""The most likely token of each decoder output, without holding all logits in memory.

Shapes: M vectors to decode, D their size, V vocabulary, G groups of W columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_SCORES_AT_ONCE = 2**22  # 16 MiB in float32.
_SMALLEST_SLICE = 2048
_GROUP = 64  # Columns per group in the two-stage search for a maximum.


def argmax_of_scores(vectors_MD: Tensor, weight_VD: Tensor, scores_at_once: int = _SCORES_AT_ONCE) -> Tensor:
    """argmax over v of vectors · weight_v, shape (M,); ties go to the smallest v.

    The vocabulary is processed in slices with a running maximum, so memory is bounded by
    `scores_at_once` scores (or 2048 per vector, if that is more).

    Args:
        vectors_MD: Outputs of the decoder.
        weight_VD: Token embeddings.
        scores_at_once: Scores held in memory at once.
    """
    best = _Best.of_none(vectors_MD)
    for start, stop in _slices(len(vectors_MD), len(weight_VD), scores_at_once):
        score_M, token_M = _max(vectors_MD @ weight_VD[start:stop].T)
        best = best.improve(score_M, token_M + start)
    return best.token_M


class _Best(NamedTuple):
    """The best token of each vector so far, and its score."""

    token_M: Tensor
    score_M: Tensor

    @staticmethod
    def of_none(vectors_MD: Tensor) -> "_Best":
        """The state before any token has been scored."""
        score_M = vectors_MD.new_full((len(vectors_MD),), -torch.inf)
        return _Best(torch.zeros_like(score_M, dtype=torch.long), score_M)

    def improve(self, score_M: Tensor, token_M: Tensor) -> "_Best":
        """Merge in another candidate per vector; ties go to the smaller token id."""
        is_better_M = (score_M > self.score_M) | ((score_M == self.score_M) & (token_M < self.token_M))
        return _Best(
            torch.where(is_better_M, token_M, self.token_M), torch.where(is_better_M, score_M, self.score_M)
        )


def _max(score_MV: Tensor) -> tuple[Tensor, Tensor]:
    """Largest score of each row and the first index that attains it, like `Tensor.max(dim=-1)`.

    On a CPU, a maximum without its index is an order of magnitude faster. So find the first group of
    columns that attains it, then search for the index in that group only.
    """
    num_whole = score_MV.shape[1] // _GROUP * _GROUP
    if score_MV.device.type != "cpu" or num_whole == 0:
        return score_MV.max(dim=-1)
    grouped_MGW = score_MV[:, :num_whole].unflatten(1, (-1, _GROUP))
    group_M = grouped_MGW.amax(-1).argmax(-1)
    row_M = torch.arange(len(score_MV))
    score_M, place_M = grouped_MGW[row_M, group_M].max(-1)
    best = _Best(group_M * _GROUP + place_M, score_M)
    if num_whole < score_MV.shape[1]:
        rest_M, place_M = score_MV[:, num_whole:].max(-1)
        best = best.improve(rest_M, place_M + num_whole)
    return best.score_M, best.token_M


def _slices(num_vectors: int, size: int, scores_at_once: int) -> list[tuple[int, int]]:
    width = max(_SMALLEST_SLICE, scores_at_once // max(num_vectors, 1))
    return [(start, min(start + width, size)) for start in range(0, size, width)]
