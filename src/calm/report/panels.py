"""Panels: plots of one question each, small enough for a phone, as SVG for both colour schemes and as PNG."""

import base64
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm.extras import require
from calm.report.palette import LIGHT, darkened

_WIDTH, _HEIGHT = 4.2, 2.9  # Inches of a panel; on a phone it is shown at about its own size.
_STYLE: Any = {
    "font.size": 9,
    "text.color": LIGHT.ink,
    "text.parse_math": False,  # Names may hold dollars.
    "axes.edgecolor": LIGHT.muted,
    "axes.labelcolor": LIGHT.muted,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "grid.color": LIGHT.line,
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT.muted,
    "ytick.color": LIGHT.muted,
    "figure.facecolor": "none",
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.fonttype": "path",  # The same widths everywhere: what fits here fits on any device.
    "svg.hashsalt": "calm",
}


@dataclass(frozen=True)
class Panel:
    """A plot of one question.

    Args:
        title: What it shows.
        draw: Draws it into axes of matplotlib; lines with a label get a legend.
    """

    title: str
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class Picture:
    """A panel as images that a page can hold.

    Args:
        title: What it shows.
        light: SVG as a data URI, for a light page.
        dark: The same for a dark one.
        width: Width in pixels of CSS.
        height: Height in pixels of CSS.
    """

    title: str
    light: str
    dark: str
    width: int
    height: int


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches.

    Raises:
        InputError: If matplotlib is missing.
    """
    require("the report", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def picture_of(panel: Panel, *, legend: bool = True) -> Picture:
    """A panel in both colour schemes.

    Args:
        panel: The panel.
        legend: Whether its legend is in the picture, or the page has it.

    Raises:
        InputError: If matplotlib is missing.
    """
    figure, file = figure_of([panel], columns=1, legend=legend), io.StringIO()
    with _style():
        figure.savefig(file, format="svg", metadata={"Date": None})
    light, dark = (
        f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
        for svg in (file.getvalue(), darkened(file.getvalue()))
    )
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Picture(panel.title, light, dark, width, height)


def write_png(panels: Sequence[Panel], path: Path) -> None:
    """Write panels side by side as one light image.

    Raises:
        InputError: If matplotlib is missing.
    """
    figure = figure_of(panels, columns=min(2, len(panels)), titled=True)
    with _style():
        figure.savefig(path, dpi=120, facecolor=LIGHT.paper)


def figure_of(panels: Sequence[Panel], columns: int, *, titled: bool = False, legend: bool = True) -> Any:
    """A figure of matplotlib, with one legend for all panels above them.

    Raises:
        InputError: If matplotlib is missing.
    """
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(_WIDTH * columns, _HEIGHT * rows)
    with _style():
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            panel.draw(axis)
            if titled:
                axis.set_title(panel.title)
        for axis in axes[len(panels) :]:
            axis.remove()
        if legend:
            _add_legend(figure, columns)
    return figure


def _add_legend(figure: Any, columns: int) -> None:
    """A legend of all that has a label, above the axes, for which the figure grows."""
    pairs = [pair for axis in figure.axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    handle_of = {label: handle for handle, label in pairs}
    if len(handle_of) < 2:
        return
    labels = [textwrap.fill(label, 40) for label in handle_of]
    longest = max(len(line) for label in labels for line in label.splitlines())
    legend = figure.legend(
        list(handle_of.values()),
        labels,
        loc="outside upper left",
        ncols=columns * (3 if longest <= 12 else 2 if longest <= 22 else 1),
    )
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield
