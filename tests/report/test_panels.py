"""Panels and their legends: readable, without overlaps, in light and dark colours."""

import base64
import re
import sys
from functools import partial
from xml.etree import ElementTree

import pytest
from reports import check_readable

from calm.errors import InputError
from calm.report.axes import draw_floors, series_style, spread_log_x, spread_x
from calm.report.palette import DARK, LIGHT
from calm.report.panels import Panel, figure_of, new_figure, picture_of, write_png


def draw(names, floors, xs, log, axis):
    draw_floors(axis, floors)
    for number, name in enumerate(names):
        axis.plot(xs, [number + x / max(xs) for x in xs], label=name, **series_style(number))
    spread_log_x(axis, "FLOPs", xs) if log else spread_x(axis, "step", from_zero=True)
    axis.set_ylabel("BrierLM")


def panel_of(names=("one",), floors=None, xs=(1, 2), log=False):
    return Panel("A title", partial(draw, names, floors or {}, xs, log))


@pytest.mark.parametrize(
    "xs",
    [
        (1, 2),
        (0.001, 0.0013),
        (3, 999),
        (20, 99_999),
        (1, 1_000_000),
        (1e12, 1.001e12),
        (1, 1e21),
        (2e11, 5e13),
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_tick_labels_do_not_overlap(xs, log):
    check_readable(figure_of([panel_of(xs=xs, log=log)], columns=1))


NAMES = {
    "one": ["this model"],
    "several": ["CALM, K = 4, energy head", "CALM, K = 4, sequential head (a_run)", "Transformer"],
    "many": [f"CALM, K = 4 (run_{number})" for number in range(12)],
    "long": [f"CALM, K = 4 ({'a very long name of a run ' * 4}{number})" for number in range(2)],
    "one long word": [f"CALM, K = 4 ({'x' * 200}{number})" for number in range(2)],
    "hostile": ["CALM ($x^{2$)", "<script>&amp; %s", "a\nb"],
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("columns", [1, 2])
def test_legend_does_not_overlap_the_axes(names, columns):
    floors = {"3-gram": 0.1, "5-gram": 0.2}
    figure = figure_of([panel_of(NAMES[names], floors)] * (2 * columns), columns, titled=True)
    (legend,) = figure.legends
    check_readable(figure)
    assert len(legend.get_texts()) == len(NAMES[names]) + 2
    heights = [axis.get_window_extent().height for axis in figure.axes]
    assert min(heights) > 100  # Pixels; the figure grows to make room for the legend.


def test_single_series_has_no_legend():
    assert not figure_of([panel_of()], columns=1).legends
    assert not figure_of([panel_of(NAMES["many"])], columns=1, legend=False).legends


def test_light_and_dark_pictures_differ_only_in_colours():
    picture = picture_of(panel_of(NAMES["several"], {"3-gram": 0.5}))
    drawings = []
    for uri in (picture.light, picture.dark):
        kind, data = uri.split(",")
        assert kind == "data:image/svg+xml;base64"
        drawings.append(base64.b64decode(data).decode())
    light, dark = drawings
    assert ElementTree.fromstring(light).tag.endswith("svg")
    shapes = [re.sub(r"#[0-9a-f]{6}\b", "", drawing) for drawing in drawings]
    assert shapes[0] == shapes[1]
    for drawing, palette in ((light, LIGHT), (dark, DARK)):
        used = set(re.findall(r"#[0-9a-f]{6}\b", drawing))
        assert {palette.ink, palette.muted, palette.line, *palette.series[:3]} <= used
        assert used <= set(palette.colours.values())
    assert not re.search(r"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", light)
    assert picture == picture_of(panel_of(NAMES["several"], {"3-gram": 0.5}))


def test_png_file_shows_all_panels(tmp_path):
    write_png([panel_of()] * 3, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure_of([panel_of()] * 3, columns=2).axes) == 3


def test_a_report_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        new_figure(1, 1)
    with pytest.raises(InputError, match="pip install matplotlib"):
        picture_of(panel_of())
