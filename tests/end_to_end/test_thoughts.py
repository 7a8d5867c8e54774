"""Thoughts carry what pauses cannot: where a path of three steps ends."""

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_thoughts_beat_pauses(tmp_path, monkeypatch):
    """With the same labels, items, steps and seed: beyond three standard errors (here it is about 0.9)."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from think_before_answering import ASKED, new_model, share_of_right_answers

    new_model(tmp_path)
    thoughts, pauses = (share_of_right_answers(tmp_path, mode) for mode in ("state", "pause"))
    error = ((thoughts * (1 - thoughts) + pauses * (1 - pauses)) / ASKED) ** 0.5
    assert thoughts - pauses > 3 * error, (thoughts, pauses)
    assert thoughts > 0.6 > 0.4 > pauses
