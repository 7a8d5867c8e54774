"""Panels: small plots that fit on a phone, as SVG in both colour schemes and as PNG."""

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
from calm.report.palette import LIGHT, for_dark_mode

_WIDTH, _HEIGHT = 4.2, 2.9  # Inches per panel, which is about its size on a phone.
_STYLE: Any = {
    "font.size": 9,
    "text.color": LIGHT.ink,
    "text.parse_math": False,  # Names may contain dollar signs.
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
    "svg.fonttype": "path",  # The same text widths on every device, so what fits here fits everywhere.
    "svg.hashsalt": "calm",
}


@dataclass(frozen=True)
class Panel:
    """A single plot.

    Args:
        title: Its title.
        draw: Draws it into matplotlib axes; lines with a label get a legend.
    """

    title: str
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class Picture:
    """A panel as images to embed in a page.

    Args:
        title: Its title.
        light: SVG as a data URI, for a light page.
        dark: SVG as a data URI, for a dark page.
        width: Width in CSS pixels.
        height: Height in CSS pixels.
    """

    title: str
    light: str
    dark: str
    width: int
    height: int


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, with its size in inches.

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
        legend: Whether the picture includes the legend; otherwise the page shows it.

    Raises:
        InputError: If matplotlib is missing.
    """
    figure, file = figure_of([panel], columns=1, legend=legend), io.StringIO()
    with _style():
        figure.savefig(file, format="svg", metadata={"Date": None})
    light, dark = (
        f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
        for svg in (file.getvalue(), for_dark_mode(file.getvalue()))
    )
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Picture(panel.title, light, dark, width, height)


def write_png(panels: Sequence[Panel], path: Path) -> None:
    """Write panels side by side as one image in the light scheme.

    Raises:
        InputError: If matplotlib is missing.
    """
    figure = figure_of(panels, columns=min(2, len(panels)), titled=True)
    with _style():
        figure.savefig(path, dpi=120, facecolor=LIGHT.paper)


def figure_of(panels: Sequence[Panel], columns: int, *, titled: bool = False, legend: bool = True) -> Any:
    """A matplotlib figure of several panels, with one legend above them.

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
    """Add a legend of everything labelled above the axes, and grow the figure to fit it."""
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
