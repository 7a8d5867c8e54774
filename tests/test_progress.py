"""Bars on a terminal, lines in a log, and neither where nobody wants them."""

import pytest
from tqdm import tqdm

import calm.progress as progress
from calm.progress import announce, progress_bar, show_progress, track, write_lines_for_bars

# Commands that an earlier test has run leave lines in the place of bars.
_BARS = {name: getattr(tqdm, name) for name in ("display", "clear", "moveto", "close")}


@pytest.fixture
def bars(monkeypatch):
    """Bars of tqdm as they are."""
    for name, method in _BARS.items():
        monkeypatch.setattr(tqdm, name, method)


@pytest.fixture
def lines(bars, monkeypatch):
    """Bars of tqdm are lines, which come at once."""
    write_lines_for_bars()
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_A_BAR", 0)


def test_a_log_gets_lines_without_carriage_returns(lines, capsys):
    for _ in track(range(4), "scoring", "batch"):
        for _ in track([1, 2], "drawing", "chunk"):
            announce("a note")
    with tqdm(total=3, desc="of a library", mininterval=0) as bar:
        bar.update(3)
    said = capsys.readouterr().err
    assert "\r" not in said and "\n\n" not in said
    texts = said.splitlines()
    assert texts.count("a note") == 8
    for what in ("scoring: 100%", "drawing: 100%", "of a library: 100%"):
        assert any(text.startswith(what) for text in texts), what


def test_quick_work_leaves_no_line(lines, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 30)
    assert list(track(iter("abc"), "reading", "letter", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_bar_of_a_terminal_is_overwritten(bars, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_A_BAR", 0)
    with progress_bar("training", 10, "step", done=4) as bar:
        bar.update(3)
    said = capsys.readouterr().err
    assert "\r" in said and "training" in said
    assert bar.n == 7 and bar.format_dict["initial"] == 4  # The time left goes by the 3 steps made here.


@pytest.mark.parametrize("why", ["quiet", "another process"])
def test_nothing_is_shown_where_nobody_wants_it(lines, monkeypatch, capsys, why):
    if why == "quiet":
        show_progress(False)
    else:
        monkeypatch.setenv("RANK", "1")
    try:
        assert list(track([1, 2], "scoring", "batch")) == [1, 2]
        announce("a note")
        assert capsys.readouterr().err == ""
    finally:
        show_progress()
