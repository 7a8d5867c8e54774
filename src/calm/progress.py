"""Progress of long work: bars on a terminal, occasional lines in a log.

A bar appears on standard error after a second, so that quick work shows none. In a group of processes, only
the first shows bars.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BEFORE_A_BAR = 1.0
_is_shown = True


def show_progress(is_shown: bool = True) -> None:
    """Turn progress bars on (the default) or off."""
    global _is_shown
    _is_shown = is_shown


def progress_bar(
    description: str, total: int | None, unit: str, *, done: int = 0, stays: bool = False
) -> tqdm:
    """A progress bar to update and close by hand.

    Args:
        description: Description of the work.
        total: Total number of units; None if unknown.
        unit: Name of the unit, in the singular.
        done: Units already done by an earlier run; the estimate of the time left does not include them.
        stays: Whether the bar stays on the terminal when it is closed.
    """
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        unit=f" {unit}",
        leave=stays,
        delay=_SECONDS_BEFORE_A_BAR,
        dynamic_ncols=True,
        disable=not (_is_shown and is_first_process()),
    )


def track(
    items: Iterable[Item], description: str, unit: str, *, total: int | None = None, stays: bool = False
) -> Iterator[Item]:
    """Iterate over items with a progress bar.

    Args:
        items: The items.
        description: See `progress_bar`.
        unit: Name of one item.
        total: Number of items; not needed if they have a length.
        stays: Whether the bar stays on the terminal.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(description, total, unit, stays=stays) as bar:
        for item in items:
            yield item
            bar.update()


def announce(text: str) -> None:
    """Print a line on standard error, above any bars; print nothing if bars are turned off."""
    if _is_shown and is_first_process():
        print_line(text)


def print_line(text: str) -> None:
    """Print a line on standard error, above any bars."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def is_first_process() -> bool:
    """Whether this is the first process of a group, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class _Lines(tqdm):
    """Bars in a log: no carriage returns, a line every half minute, and one at the end."""

    fp: TextIO
    disable: bool

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print the bar, if the last line is half a minute old."""
        now = time.monotonic()
        if now - self.__dict__.setdefault("line_at", now) < SECONDS_BETWEEN_LINES:
            return False
        self.__dict__.update(line_at=now, has_lines=True)
        print(self, file=self.fp, flush=True)
        return True

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: nothing is overwritten."""

    def moveto(self, n: int) -> None:
        """Do nothing: several bars take turns."""

    def close(self) -> None:
        """Close the bar, with a last line if it had any."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)
        if self.__dict__.get("has_lines"):
            print(self, file=self.fp, flush=True)


def write_lines_for_bars() -> None:
    """Turn every bar of this process, also those of other libraries, into lines of a log."""
    for name in ("display", "clear", "moveto", "close"):
        setattr(tqdm, name, vars(_Lines)[name])
