"""The benchmarks print their tables from the results in the repository, as docs/benchmarks says."""

import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EXPECTED_ROWS = {
    "autoencoders": "| 16 dimensions |",
    "ladder": "| 4-gram |",
    "second_stage": "| the last fifth by Brier scores | 2.5e+12 | 2 |",
}


@pytest.mark.parametrize("name", EXPECTED_ROWS)
def test_table_is_printed_from_the_committed_results(name, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert EXPECTED_ROWS[name] in result.stdout


@pytest.fixture
def ladder_table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ladder_table

    return ladder_table


@pytest.fixture
def line_of_differences(ladder_table):
    return ladder_table.line_of_differences


def test_interval_of_the_crossing_contains_it_as_often_as_one_standard_error_should(line_of_differences):
    budgets = [5e12, 1e13, 2e13, 5e13] * 2
    noise = random.Random(1)
    hits = 0
    for _ in range(1000):
        line = line_of_differences(
            budgets, [0.15 * (math.log10(flops) - 14) + noise.gauss(0, 0.01) for flops in budgets]
        )
        low, high = map(float, re.search(r"\((\S+) to (\S+)\)", line).groups())
        hits += low <= 1e14 <= high
    assert 0.62 < hits / 1000 < 0.78  # 0.68, and a little more for the rounding of the printed numbers.


def test_flat_differences_have_no_crossing(line_of_differences):
    line = line_of_differences([5e12, 1e13, 2e13, 5e13], [-0.10, -0.12, -0.09, -0.11])
    assert "none that can be told from zero, on average -0.105" in line
    assert "zero at" not in line


def test_flops_for_a_score_are_interpolated_in_their_logarithm(ladder_table):
    nats = {1e13: 4.5, 4e13: 4.3, 1e14: 4.2}
    assert ladder_table.flops_for(4.4, nats) == pytest.approx(2e13)
    assert ladder_table.flops_for(4.2, nats) == pytest.approx(1e14)
    assert ladder_table.flops_for(4.1, nats) is None
    assert ladder_table.flops_for(4.6, nats) is None


def test_only_models_of_the_chosen_width_are_compared(ladder_table):
    def row(width, seed, nats, **scores):
        return {
            "kind": "baseline", "budget": 1e13, "width": width, "seed": seed, "nats_to_choose_by": nats
        } | scores  # fmt: skip

    rows = [
        row(64, 1, 4.2, brier_lm=0.6),
        row(96, 1, 4.1, brier_lm=0.7),
        row(96, 2, 4.3, brier_lm=0.5),
        row(64, 2, 4.0, brier_lm=0.8),
        row(96, 3, 4.0),
    ]
    assert ladder_table.chosen(rows) == [rows[1], rows[2]]
