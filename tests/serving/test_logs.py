"""Repeated log lines are folded."""

import logging

from calm.serving.logs import FoldRepeats


class ListHandler(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def folding_logger(max_lines, clock):
    logger, handler = logging.Logger("test"), ListHandler()
    logger.addFilter(FoldRepeats(max_lines, 60, clock))
    logger.addHandler(handler)
    return logger, handler.lines


def test_repeated_lines_are_folded_within_a_period():
    now = [0.0]
    logger, lines = folding_logger(3, lambda: now[0])
    for number in range(100):
        logger.warning("request %d failed", number)
    logger.error("something else")
    assert lines == ["request 0 failed", "request 1 failed", "request 2 failed", "something else"]
    now[0] = 61
    logger.warning("request %d failed", 100)
    logger.warning("request %d failed", 101)
    assert lines[4:] == ["request 100 failed (97 more like this were not shown)", "request 101 failed"]


def test_lines_are_folded_separately_for_each_type_of_error():
    logger, lines = folding_logger(1, lambda: 0.0)
    for error in (ValueError("a"), ValueError("b"), KeyError("c")):
        logger.error("failed", exc_info=error)
    assert len(lines) == 2


def test_lines_that_all_differ_are_limited_too():
    logger, lines = folding_logger(2, lambda: 0.0)
    for number in range(10_000):
        logger.warning(f"odd {number}")
    assert len(lines) <= 102
