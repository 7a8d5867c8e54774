"""Axes of plots: colours and markers of series, what others are measured by, and ticks that have room."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calm.quantities import short
from calm.report.palette import LIGHT

_MOST_TICKS = 5
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}
_DASHES = ((5, 2), (1, 1.5), (5, 2, 1, 2))


@dataclass(frozen=True)
class Entry:
    """An entry of a legend that the page shows.

    Args:
        name: What is drawn so.
        mark: The marker of a series, as a character.
        colour: Its colour, by its name in the palette.
        dashes: Lengths of dashes and gaps of a horizontal line, in pixels.
    """

    name: str
    mark: str = ""
    colour: str = ""
    dashes: str = ""


def series_style(number: int) -> dict[str, str]:
    """Colour and marker of a series; together they repeat only after thirty."""
    return {
        "color": LIGHT.series[number % len(LIGHT.series)],
        "marker": list(_MARKERS)[number % len(_MARKERS)],
    }


def entry_of_series(number: int, name: str) -> Entry:
    """How a page names a series."""
    mark = _MARKERS[series_style(number)["marker"]]
    return Entry(name, mark=mark, colour=f"series-{number % len(LIGHT.series)}")


def entry_of_floor(number: int, name: str) -> Entry:
    """How a page names a horizontal line of `draw_floors`."""
    dashes = _DASHES[number % len(_DASHES)]
    return Entry(name, dashes=" ".join(f"{1.2 * length:g}" for length in dashes))


def draw_floors(axis: Any, heights: dict[str, float]) -> None:
    """Horizontal lines of models that others are measured by."""
    for number, (name, height) in enumerate(heights.items()):
        style = (0, _DASHES[number % len(_DASHES)])
        axis.axhline(height, color=LIGHT.muted, linestyle=style, linewidth=1.2, label=name)


def spread_x(axis: Any, label: str, *, from_zero: bool) -> None:
    """Label a linear axis of x, with few ticks, in short numbers where it begins at 0."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(_MOST_TICKS))
    if from_zero:  # Otherwise neighbours may differ in their fourth digit.
        axis.set_xlim(0, 1.05 * axis.dataLim.xmax)
        axis.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,g}" if value < 10_000 else short(value))
        )


def spread_log_x(axis: Any, label: str, values: Sequence[float]) -> None:
    """Make the axis of x logarithmic around values, with few ticks at round numbers."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    ticks = ticks_around(min(values), max(values))
    axis.set(xlabel=label, xscale="log", xlim=(ticks[0], ticks[-1]))
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FixedFormatter([short(tick) for tick in ticks]))
    axis.xaxis.set_minor_locator(NullLocator())  # Their labels would collide where decades are few.


def ticks_around(low: float, high: float) -> list[float]:
    """Two to six round numbers; the first lies below a range of positive numbers, the last above it."""
    low, high = low / 1.2, high * 1.2
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    begin = max(number for number, tick in enumerate(fine) if tick <= low)
    end = min(number for number, tick in enumerate(fine) if tick >= high)
    if end - begin <= _MOST_TICKS:
        return fine[begin : end + 1]
    step = math.ceil((last - first) / _MOST_TICKS)
    return [10.0**power for power in range(first, last + step, step)]
