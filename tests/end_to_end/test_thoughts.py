"""Continuous thoughts can follow a path of three steps to its end; pauses cannot."""

import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.timeout(900)  # One or two minutes on an idle machine.
def test_thoughts_beat_pauses(tmp_path, monkeypatch, capsys):
    """By more than three standard errors, with the same labels, items, steps and seed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import think_before_answering as example

    monkeypatch.setattr(sys, "argv", ["think_before_answering.py", str(tmp_path / "thinking")])
    example.main()
    printed = re.findall(r"with (\w+): (\d+)% right", capsys.readouterr().out)
    shares = {words: int(percent) / 100 for words, percent in printed}
    thoughts, pauses = shares["thoughts"], shares["pauses"]
    error = ((thoughts * (1 - thoughts) + pauses * (1 - pauses)) / example.ASKED) ** 0.5
    assert thoughts - pauses > 3 * error, shares
    assert thoughts > 0.6 > 0.4 > pauses
