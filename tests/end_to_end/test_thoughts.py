"""Thoughts carry what pauses cannot: where a path of three steps ends."""

import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.timeout(900)  # A minute or two where nothing else runs.
def test_thoughts_beat_pauses(tmp_path, monkeypatch, capsys):
    """With the same labels, items, steps and seed: beyond three standard errors (here it is about 0.9)."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import think_before_answering as example

    monkeypatch.setattr(sys, "argv", ["think_before_answering.py", str(tmp_path / "thinking")])
    example.main()
    told = re.findall(r"with (\w+): (\d+)% right", capsys.readouterr().out)
    shares = {words: int(percent) / 100 for words, percent in told}
    thoughts, pauses = shares["thoughts"], shares["pauses"]
    error = ((thoughts * (1 - thoughts) + pauses * (1 - pauses)) / example.ASKED) ** 0.5
    assert thoughts - pauses > 3 * error, shares
    assert thoughts > 0.6 > 0.4 > pauses
