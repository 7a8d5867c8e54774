"""The benchmarks print their tables from the results in the repository, as docs/benchmarks says."""

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
