"""Lines that repeat are folded."""

import logging

from calm.serving.logs import FoldRepeats


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def logger_with(most, clock):
    logger, lines = logging.Logger("of a test"), Lines()
    logger.addFilter(FoldRepeats(most, 60, clock))
    logger.addHandler(lines)
    return logger, lines.lines


def test_lines_of_a_kind_are_few_in_a_period():
    now = [0.0]
    logger, lines = logger_with(3, lambda: now[0])
    for number in range(100):
        logger.warning("request %d failed", number)
    logger.error("something else")
    assert lines == ["request 0 failed", "request 1 failed", "request 2 failed", "something else"]
    now[0] = 61
    logger.warning("request %d failed", 100)
    logger.warning("request %d failed", 101)
    assert lines[4:] == ["request 100 failed (97 more like this were not shown)", "request 101 failed"]


def test_other_errors_are_other_kinds():
    logger, lines = logger_with(1, lambda: 0.0)
    for error in (ValueError("a"), ValueError("b"), KeyError("c")):
        logger.error("failed", exc_info=error)
    assert len(lines) == 2


def test_lines_that_all_differ_are_folded_too():
    logger, lines = logger_with(2, lambda: 0.0)
    for number in range(10_000):
        logger.warning(f"odd {number}")
    assert len(lines) <= 102
