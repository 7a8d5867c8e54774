"""Figures as JSON that every parser accepts."""

import json
import math

import pytest
from reports import STRONG

from calm.evaluation.held_out import Scorecard
from calm.evaluation.perplexity import PerplexityResult
from calm.report.figures import as_json, values_of_scorecard, write_figures


def test_non_finite_numbers_are_null(tmp_path):
    write_figures(
        {"a": [1.5, math.nan, {"b": (math.nan, 2, math.inf, -math.inf)}], "c": "nan"}, tmp_path / "a.json"
    )
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and text.endswith("\n")
    assert json.loads(text) == {"a": [1.5, None, {"b": [None, 2, None, None]}], "c": "nan"}


@pytest.mark.parametrize(("nats", "perplexity"), [(math.log(20), 20), (709, math.exp(709)), (710, None)])
def test_perplexity_beyond_the_range_of_a_float_is_null(nats, perplexity):
    result = PerplexityResult(nats, 5000)
    assert result.perplexity == pytest.approx(math.inf if perplexity is None else perplexity)
    card = Scorecard("autoregressive", STRONG, perplexity=result)
    stored = json.loads(as_json(values_of_scorecard(card)))["perplexity"]
    assert stored == {"cross_entropy": nats, "num_tokens": 5000, "perplexity": pytest.approx(perplexity)}
