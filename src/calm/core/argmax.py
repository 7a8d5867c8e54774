"""The most likely token of each decoder output, without holding all logits in memory.

Shapes: M vectors to decode, D their size, V vocabulary, G groups of W columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_LOGITS_AT_ONCE = 2**22  # 16 MiB in float32.
_SMALLEST_SLICE = 2048
_GROUP = 64  # Columns per group in the two-stage search for a maximum.


def argmax_of_logits(vectors_MD: Tensor, weight_VD: Tensor, logits_at_once: int = _LOGITS_AT_ONCE) -> Tensor:
    """argmax over v of vectors · weight_v, shape (M,); ties go to the smallest v.

    The vocabulary is processed in slices with a running maximum, so memory is bounded by
    `logits_at_once` logits (or 2048 per vector, if that is more).

    Args:
        vectors_MD: Outputs of the decoder.
        weight_VD: Token embeddings.
        logits_at_once: Logits in memory at once.
    """
    best = _Best.initial(vectors_MD)
    for start, stop in _slices(len(vectors_MD), len(weight_VD), logits_at_once):
        logit_M, token_M = _max(vectors_MD @ weight_VD[start:stop].T)
        best = best.merge(logit_M, token_M + start)
    return best.token_M


class _Best(NamedTuple):
    """The best token of each vector so far, and its logit."""

    token_M: Tensor
    logit_M: Tensor

    @staticmethod
    def initial(vectors_MD: Tensor) -> "_Best":
        """The state before any token was compared."""
        logit_M = vectors_MD.new_full((len(vectors_MD),), -torch.inf)
        return _Best(torch.zeros_like(logit_M, dtype=torch.long), logit_M)

    def merge(self, logit_M: Tensor, token_M: Tensor) -> "_Best":
        """Compare with another candidate per vector; ties go to the smaller token id."""
        is_better_M = (logit_M > self.logit_M) | ((logit_M == self.logit_M) & (token_M < self.token_M))
        return _Best(
            torch.where(is_better_M, token_M, self.token_M), torch.where(is_better_M, logit_M, self.logit_M)
        )


def _max(logits_MV: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of each row and the first index that attains it, like `Tensor.max(dim=-1)`.

    On a CPU, a maximum without its index is an order of magnitude faster. So find the first group of
    columns that attains it, then search for the index in that group only.
    """
    num_grouped = logits_MV.shape[1] // _GROUP * _GROUP
    if logits_MV.device.type != "cpu" or num_grouped == 0:
        return logits_MV.max(dim=-1)
    grouped_MGW = logits_MV[:, :num_grouped].unflatten(1, (-1, _GROUP))
    group_M = grouped_MGW.amax(-1).argmax(-1)
    row_M = torch.arange(len(logits_MV))
    logit_M, column_M = grouped_MGW[row_M, group_M].max(-1)
    best = _Best(group_M * _GROUP + column_M, logit_M)
    if num_grouped < logits_MV.shape[1]:
        logit_M, column_M = logits_MV[:, num_grouped:].max(-1)
        best = best.merge(logit_M, num_grouped + column_M)
    return best.logit_M, best.token_M


def _slices(num_vectors: int, size: int, logits_at_once: int) -> list[tuple[int, int]]:
    width = max(_SMALLEST_SLICE, logits_at_once // max(num_vectors, 1))
    return [(start, min(start + width, size)) for start in range(0, size, width)]
