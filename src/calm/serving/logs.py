"""Log lines that repeat are folded, so that no client can fill a disk."""

import logging
import threading
import time
from collections.abc import Callable

_LOGGERS = (
    "asyncio",
    "uvicorn.error",
    "calm.models.writing.batching",
    "calm.serving.app",
    "calm.serving.connections",
    "calm.serving.engine",
    "calm.serving.watch",
)
_MOST_KINDS = 100  # Of lines in a period; all others count as one kind.


class FoldRepeats(logging.Filter):
    """Lets some lines of each kind pass in every period; the first of the next one tells how many did not.

    Args:
        most: Lines of a kind in a period.
        seconds: Length of a period.
        clock: Tells the time.
    """

    def __init__(
        self, most: int = 20, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._most, self._seconds, self._clock = most, seconds, clock
        self._lock = threading.Lock()
        self._began = clock()
        self._numbers: dict[tuple[object, ...], int] = {}
        self._folded: dict[tuple[object, ...], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line passes."""
        error = record.exc_info[0] if record.exc_info else None
        kind: tuple[object, ...] = (record.name, record.levelno, str(record.msg), error)
        with self._lock:
            if self._clock() - self._began >= self._seconds:
                self._began, self._numbers = self._clock(), {}
            if kind not in self._numbers and len(self._numbers) >= _MOST_KINDS:
                kind = ()
            self._numbers[kind] = number = self._numbers.get(kind, 0) + 1
            if number > self._most:
                self._folded[kind] = self._folded.get(kind, 0) + 1
                return False
            folded = self._folded.pop(kind, 0)
            if len(self._folded) > 2 * _MOST_KINDS:
                self._folded.clear()
        if folded:
            record.msg, record.args = f"{record.getMessage()} ({folded} more like this were not shown)", None
        return True


_FOLD = FoldRepeats()


def fold_repeats() -> None:
    """Fold what a server's loggers repeat."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_FOLD)
