"""Every line of slow.txt is a test that exists."""

import re
from pathlib import Path

import pytest
from slow import slow_tests

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("line", slow_tests())
def test_every_line_of_slow_txt_is_a_test(line):
    file, _, test = line.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    name, bracket, case = test.partition("[")
    assert not test or re.search(rf"^def {re.escape(name)}\(", text, re.MULTILINE)
    assert not bracket or case
