"""Progress: bars on a terminal, lines in a log, nothing in quiet runs and other ranks."""

import pytest
from tqdm import tqdm

import calm.progress as progress
from calm.progress import announce, progress_bar, show_progress, track, write_lines_for_bars

# An earlier test may have run a command, which replaces bars by lines.
_BARS = {name: getattr(tqdm, name) for name in ("display", "clear", "moveto", "close")}


@pytest.fixture
def bars(monkeypatch):
    """tqdm as it comes, with bars."""
    for name, method in _BARS.items():
        monkeypatch.setattr(tqdm, name, method)


@pytest.fixture
def lines(bars, monkeypatch):
    """tqdm writes lines instead of bars, without delay."""
    write_lines_for_bars()
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_A_BAR", 0)


def test_a_log_gets_lines_without_carriage_returns(lines, capsys):
    for _ in track(range(4), "scoring", "batch"):
        for _ in track([1, 2], "drawing", "chunk"):
            announce("a note")
    with tqdm(total=3, desc="of a library", mininterval=0) as bar:
        bar.update(3)
    written = capsys.readouterr().err
    assert "\r" not in written and "\n\n" not in written
    texts = written.splitlines()
    assert texts.count("a note") == 8
    for start in ("scoring: 100%", "drawing: 100%", "of a library: 100%"):
        assert any(text.startswith(start) for text in texts), start


def test_quick_work_writes_no_line(lines, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 30)
    assert list(track(iter("abc"), "reading", "letter", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_is_overwritten(bars, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_A_BAR", 0)
    with progress_bar("training", 10, "step", done=4) as bar:
        bar.update(3)
    written = capsys.readouterr().err
    assert "\r" in written and "training" in written
    assert (
        bar.n == 7 and bar.format_dict["initial"] == 4
    )  # tqdm estimates the time left from the 3 new steps.


@pytest.mark.parametrize("reason", ["quiet", "another process"])
def test_quiet_runs_and_other_processes_show_nothing(lines, monkeypatch, capsys, reason):
    if reason == "quiet":
        show_progress(False)
    else:
        monkeypatch.setenv("RANK", "1")
    try:
        assert list(track([1, 2], "scoring", "batch")) == [1, 2]
        announce("a note")
        assert capsys.readouterr().err == ""
    finally:
        show_progress()
