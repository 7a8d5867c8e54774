"""Axes of plots: colours and markers of series, baseline lines, and ticks that do not overlap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calm.quantities import short
from calm.report.palette import LIGHT

_MAX_TICKS = 5
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}
_DASHES = ((5, 2), (1, 1.5), (5, 2, 1, 2))


@dataclass(frozen=True)
class Entry:
    """A legend entry shown by the page.

    Args:
        name: Name of the series or line.
        mark: Marker of a series, as a character.
        colour: Its colour, by name in the palette.
        dashes: Lengths of dashes and gaps of a horizontal line, in pixels.
    """

    name: str
    mark: str = ""
    colour: str = ""
    dashes: str = ""


def series_style(number: int) -> dict[str, str]:
    """Colour and marker of a series; the combination repeats only after thirty series."""
    return {
        "color": LIGHT.series[number % len(LIGHT.series)],
        "marker": list(_MARKERS)[number % len(_MARKERS)],
    }


def entry_of_series(number: int, name: str) -> Entry:
    """Legend entry of a series."""
    mark = _MARKERS[series_style(number)["marker"]]
    return Entry(name, mark=mark, colour=f"series-{number % len(LIGHT.series)}")


def entry_of_floor(number: int, name: str) -> Entry:
    """Legend entry of a horizontal line drawn by `draw_floors`."""
    dashes = _DASHES[number % len(_DASHES)]
    return Entry(name, dashes=" ".join(f"{1.2 * length:g}" for length in dashes))


def draw_floors(axis: Any, heights: dict[str, float]) -> None:
    """Draw horizontal lines for models that serve as a baseline."""
    for number, (name, height) in enumerate(heights.items()):
        style = (0, _DASHES[number % len(_DASHES)])
        axis.axhline(height, color=LIGHT.muted, linestyle=style, linewidth=1.2, label=name)


def spread_x(axis: Any, label: str, *, from_zero: bool) -> None:
    """Label a linear x axis, with few ticks, and with short numbers if it starts at 0."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(_MAX_TICKS))
    if from_zero:  # Otherwise, neighbouring ticks may only differ in their fourth digit.
        axis.set_xlim(0, 1.05 * axis.dataLim.xmax)
        axis.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,g}" if value < 10_000 else short(value))
        )


def spread_log_x(axis: Any, label: str, values: Sequence[float]) -> None:
    """Make the x axis logarithmic around the values, with few ticks at round numbers."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    ticks = ticks_around(min(values), max(values))
    axis.set(xlabel=label, xscale="log", xlim=(ticks[0], ticks[-1]))
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FixedFormatter([short(tick) for tick in ticks]))
    axis.xaxis.set_minor_locator(NullLocator())  # With few decades, minor labels would overlap.


def ticks_around(low: float, high: float) -> list[float]:
    """Two to six round numbers, the first below a range of positive numbers and the last above it."""
    low, high = low / 1.2, high * 1.2
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    begin = max(i for i, tick in enumerate(fine) if tick <= low)
    end = min(i for i, tick in enumerate(fine) if tick >= high)
    if end - begin <= _MAX_TICKS:
        return fine[begin : end + 1]
    step = math.ceil((last - first) / _MAX_TICKS)
    return [10.0**power for power in range(first, last + step, step)]
