"""Losses, gradients, texts and scores are those that were recorded in golden.json."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from golden.values import all_values

RECORDED = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, Any]:
    return json.loads(json.dumps(all_values(tmp_path_factory.mktemp("golden"))))


@pytest.mark.parametrize("name", RECORDED)
def test_values_are_those_that_were_recorded(values, name):
    # The bits of files hold the versions of libraries; values.py compares them on one machine.
    assert list(far_apart(RECORDED[name], values[name])) == []


def far_apart(before: Any, after: Any, path: str = ""):
    """Where numbers differ by more than rounding, or anything else differs at all."""
    if isinstance(before, dict):
        assert before.keys() == after.keys(), path
        for key in before.keys() - {"bits of files"}:
            yield from far_apart(before[key], after[key], f"{path} / {key}")
    elif isinstance(before, list):
        assert len(before) == len(after), path
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from far_apart(old, new, f"{path} / {number}")
    elif isinstance(before, float) and isinstance(after, float):
        if not math.isclose(before, after, rel_tol=1e-3, abs_tol=1e-5):
            yield f"{path}: {before} became {after}"
    elif before != after:
        yield f"{path}: {before} became {after}"


def test_changed_values_are_found():
    before, after = {"loss": 1.0, "texts": [[1, 2], [3, 4]]}, {"loss": 1.01, "texts": [[1, 2], [3, 5]]}
    assert sorted(far_apart(before, after)) == [" / loss: 1.0 became 1.01", " / texts / 1 / 1: 4 became 5"]
