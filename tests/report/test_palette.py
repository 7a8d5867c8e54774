"""Colours: enough contrast in both schemes, and series that most people can tell apart."""

import itertools
import math

import pytest

from calm.report.palette import DARK, LIGHT, for_dark_mode

SCHEMES = pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SEEN = {
    "by most": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "with protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "with deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
WHITE = (0.9505, 1.0, 1.089)


def linear(colour):
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def contrast(one, other):
    """The contrast ratio of WCAG 2."""
    low, high = sorted(times(XYZ, linear(colour))[1] for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(colour, seen):
    rgb = [min(1, max(0, share)) for share in times(seen, linear(colour))]
    x, y, z = (
        math.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116
        for v in (value / white for value, white in zip(times(XYZ, rgb), WHITE, strict=True))
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_the_measure_of_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@SCHEMES
def test_text_can_be_read_on_everything_that_is_behind_it(palette):
    for text, behind in itertools.product(("ink", "muted"), ("paper", "surface")):
        assert contrast(getattr(palette, text), getattr(palette, behind)) >= 4.5, (text, behind)
    for line in (*palette.series, palette.accent, palette.muted):
        assert contrast(line, palette.paper) >= 3, line


@SCHEMES
@pytest.mark.parametrize("seen", SEEN)
def test_series_can_be_told_apart(palette, seen):
    for one, other in itertools.combinations(palette.series, 2):
        assert math.dist(lab(one, SEEN[seen]), lab(other, SEEN[seen])) > 10, (one, other)


def test_a_drawing_is_darkened_colour_by_colour():
    drawing = "".join(f'<path style="stroke: {colour}"/>' for colour in LIGHT.colours.values())
    expected = "".join(f'<path style="stroke: {colour}"/>' for colour in DARK.colours.values())
    assert for_dark_mode(drawing + "#ABCDEF #abcdef0") == expected + "#ABCDEF #abcdef0"
    assert len(set(LIGHT.colours.values())) == len(LIGHT.colours)  # Else two colours would become one.
