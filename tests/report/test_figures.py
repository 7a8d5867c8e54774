"""Figures as JSON that any reader takes."""

import json
import math

from calm.report.figures import write_figures


def test_what_is_not_a_number_is_null(tmp_path):
    write_figures({"a": [1.5, math.nan, {"b": (math.nan, 2)}], "c": "nan"}, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text and text.endswith("\n")
    assert json.loads(text) == {"a": [1.5, None, {"b": [None, 2]}], "c": "nan"}
