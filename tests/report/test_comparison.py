"""Models side by side: which is the best, and how far the others are from it."""

from unittest.mock import Mock

import pytest
import torch

from calm.core.brier import DocumentSums, brier_lm_difference
from calm.evaluation.brier import BrierResult
from calm.report.comparison import _best, _difference


def test_the_difference_to_the_best_model():
    scores, document = torch.rand(80, 4, generator=torch.Generator().manual_seed(0)), torch.arange(80) // 4

    def result_of(scores_PK, documents_P):
        sums = DocumentSums.of_positions(scores_PK, documents_P)
        return BrierResult(tuple(sums.means_X.tolist()), len(scores_PK), 64, documents=sums)

    first, better = result_of(scores, document), result_of(scores * 1.1, document)
    difference, error = brier_lm_difference(better.documents, first.documents)
    assert difference == pytest.approx(0.1 * first.brier_lm) and 0 < error < 0.2 * difference
    assert _difference(better, first) == f"+{difference:.2f}±{error:.2f}"
    assert _difference(first, first) == ""
    other = result_of(scores[:-4] * 1.2, document[:-4])  # Better still, in windows that no other model has.
    assert _difference(other, first) == ""
    results = [Mock(card=Mock(brier=brier)) for brier in (first, other, better)]
    assert _best(Mock(results=results)) is results[2]
