"""Repeated log lines are collapsed, so that no client can fill a disk."""

import logging
import threading
import time
from collections.abc import Callable

_LOGGERS = (
    "asyncio",
    "uvicorn.error",
    "calm.models.generation.batching",
    "calm.serving.app",
    "calm.serving.connections",
    "calm.serving.engine",
    "calm.serving.watch",
)
_MAX_KINDS = 100  # Kinds of lines per period; all others count as one kind.


class FoldRepeats(logging.Filter):
    """Passes a few lines of each kind per period; the next line that passes says how many were dropped.

    Args:
        max_lines: Maximum lines of a kind per period.
        seconds: Length of a period.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, max_lines: int = 20, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._max_lines, self._seconds, self._clock = max_lines, seconds, clock
        self._lock = threading.Lock()
        self._period_start = clock()
        self._counts: dict[tuple[object, ...], int] = {}
        self._folded: dict[tuple[object, ...], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to let a line pass."""
        error = record.exc_info[0] if record.exc_info else None
        kind: tuple[object, ...] = (record.name, record.levelno, str(record.msg), error)
        with self._lock:
            if self._clock() - self._period_start >= self._seconds:
                self._period_start, self._counts = self._clock(), {}
            if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
                kind = ()
            self._counts[kind] = count = self._counts.get(kind, 0) + 1
            if count > self._max_lines:
                self._folded[kind] = self._folded.get(kind, 0) + 1
                return False
            folded = self._folded.pop(kind, 0)
            if len(self._folded) > 2 * _MAX_KINDS:
                self._folded.clear()
        if folded:
            record.msg, record.args = f"{record.getMessage()} ({folded} more like this were not shown)", None
        return True


_FOLD = FoldRepeats()


def fold_repeats() -> None:
    """Collapse the repeated lines of a server's loggers."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_FOLD)
