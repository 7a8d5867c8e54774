"""Tables of benchmarks are drawn from the results in the repository, as docs/benchmarks says."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LINES = {
    "autoencoders": "| 16 dimensions |",
    "ladder": "| 4-gram |",
    "second_stage": "| the last fifth by Brier scores | 2.5e+12 | 2 |",
}


@pytest.mark.parametrize("name", LINES)
def test_a_table_needs_nothing_but_the_results(name, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert LINES[name] in ran.stdout
