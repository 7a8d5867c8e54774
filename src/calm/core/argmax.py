"""The most likely token of each decoder output, without all token scores in memory.

Shapes: M vectors to decode, D their size, V vocabulary, R rank of a screen, C tokens to confirm.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_SCORES_AT_ONCE = 2**22  # 16 MiB in float32.
_SMALLEST_SLICE = 2048
_GROUP = 64  # Columns that are searched together for a maximum.
_ROUNDING = 1e-5  # Of |vector| · |weight|: well above what a float32 product of 10,000 terms can lose.


def argmax_of_scores(vectors_MD: Tensor, weight_VD: Tensor, scores_at_once: int = _SCORES_AT_ONCE) -> Tensor:
    """argmax over v of vectors · weight_v, shape (M,); ties go to the smallest v.

    The vocabulary is passed in slices with a running maximum, so that memory is bounded by
    `scores_at_once` scores (or 2048 for each vector, if that is more).

    Args:
        vectors_MD: Outputs of the decoder.
        weight_VD: Token embeddings.
        scores_at_once: Scores held at the same time.
    """
    best = _Best.of_none(vectors_MD)
    for start, stop in _slices(len(vectors_MD), len(weight_VD), scores_at_once):
        score_M, token_M = _max(vectors_MD @ weight_VD[start:stop].T)
        best = best.improve(score_M, token_M + start)
    return best.token_M


class Screen:
    """A certified shortcut to the same argmax: bound all scores in low rank, confirm the few that count.

    With an orthonormal basis of the R strongest directions of the embeddings, and bars for what is
    left of a vector outside of them, Cauchy and Schwarz bound every score from above by

        vector · weight_v <= (basis vector) · (basis weight_v) + |vector̄| |weight̄_v|.

    A token whose bound is below the true score of another cannot be the argmax; all others are
    scored in full. The result does not depend on how good the bound is, only the time does.

    Args:
        weight_VD: Token embeddings, which must not change afterwards.
        rank: Directions R, fewer than D.

    Raises:
        ValueError: If the rank is not in 1..D-1.
    """

    def __init__(self, weight_VD: Tensor, rank: int) -> None:
        size = weight_VD.shape[1]
        if not 0 < rank < size:
            raise ValueError(f"the rank of a screen must lie in 1..{size - 1}, got {rank}.")
        # Bounds are no use where rounding is coarse, so bfloat16 is scored in float32.
        self.weight_VD = weight_VD.detach().to(torch.promote_types(weight_VD.dtype, torch.float32))
        weight = self.weight_VD.double()
        # eigh sorts upwards: the strongest directions come last.
        basis_DR = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, -rank:]
        part_VR = weight @ basis_DR
        rest_V = (weight.square().sum(1) - part_VR.square().sum(1)).clamp_min(0).sqrt()
        norm_V = weight.norm(dim=1)
        self.basis_DR = basis_DR.to(self.weight_VD.dtype)
        bound_VR = torch.cat([part_VR, rest_V[:, None], norm_V[:, None]], dim=1)
        self.bound_VR = bound_VR.to(self.weight_VD.dtype)

    def argmax(self, vectors_MD: Tensor, scores_at_once: int = _SCORES_AT_ONCE) -> Tensor:
        """As `argmax_of_scores` with the embeddings of this screen."""
        vectors_MD = vectors_MD.to(self.weight_VD.dtype)
        part_MR = vectors_MD @ self.basis_DR
        norm_M1 = vectors_MD.norm(dim=1, keepdim=True)
        rest_M1 = (norm_M1.square() - part_MR.square().sum(1, keepdim=True)).clamp_min(0).sqrt()
        # The difference of squares loses digits where the rest is small: widen it by their share.
        rest_M1 = rest_M1 + _ROUNDING**0.5 * norm_M1
        query_MR = torch.cat([part_MR, rest_M1, _ROUNDING * norm_M1], dim=1)
        best = _Best.of_none(vectors_MD)
        for start, stop in _slices(len(vectors_MD), len(self.weight_VD), scores_at_once):
            bound_MV = query_MR @ self.bound_VR[start:stop].T
            likely_M = _max(bound_MV)[1] + start
            best = best.improve((vectors_MD * self.weight_VD[likely_M]).sum(-1), likely_M)
            # Confirm with one product for all vectors: tokens that could be the best of any of them.
            token_C = (bound_MV >= best.score_M[:, None]).any(0).nonzero().squeeze(1) + start
            if len(token_C):
                score_M, place_M = _max(vectors_MD @ self.weight_VD[token_C].T)
                best = best.improve(score_M, token_C[place_M])
        return best.token_M


class _Best(NamedTuple):
    """The best token of each vector so far, and its score."""

    token_M: Tensor
    score_M: Tensor

    @staticmethod
    def of_none(vectors_MD: Tensor) -> "_Best":
        """Before any token was scored."""
        score_M = vectors_MD.new_full((len(vectors_MD),), -torch.inf)
        return _Best(torch.zeros_like(score_M, dtype=torch.long), score_M)

    def improve(self, score_M: Tensor, token_M: Tensor) -> "_Best":
        """The better of two for each vector; the smaller token where scores are equal."""
        is_better_M = (score_M > self.score_M) | ((score_M == self.score_M) & (token_M < self.token_M))
        return _Best(
            torch.where(is_better_M, token_M, self.token_M), torch.where(is_better_M, score_M, self.score_M)
        )


def _max(score_MV: Tensor) -> tuple[Tensor, Tensor]:
    """Largest score of each row and the first place that has it, as `Tensor.max(dim=-1)`.

    A maximum without its place is an order of magnitude quicker on a CPU: find the group of columns
    that has it first, and look for the place in that group alone.
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
