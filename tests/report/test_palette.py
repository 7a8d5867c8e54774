"""Colours: enough contrast in both schemes, and series that most people can tell apart."""

import itertools
import math

import pytest

from calm.report.palette import DARK, LIGHT, for_dark_mode

SCHEMES = pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
# How colours are seen: Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
WHITE = (0.9505, 1.0, 1.089)


def linear(colour):
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def contrast(first, second):
    """The contrast ratio of WCAG 2."""
    low, high = sorted(times(XYZ, linear(colour))[1] for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def lab(colour, vision):
    rgb = [min(1, max(0, share)) for share in times(vision, linear(colour))]
    x, y, z = (
        math.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116
        for v in (value / white for value, white in zip(times(XYZ, rgb), WHITE, strict=True))
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@SCHEMES
def test_text_and_lines_stand_out_from_their_background(palette):
    for text, background in itertools.product(("ink", "muted"), ("paper", "surface")):
        assert contrast(getattr(palette, text), getattr(palette, background)) >= 4.5, (text, background)
    for line in (*palette.series, palette.accent, palette.muted):
        assert contrast(line, palette.paper) >= 3, line


@SCHEMES
@pytest.mark.parametrize("vision", VISION)
def test_series_can_be_told_apart(palette, vision):
    for first, second in itertools.combinations(palette.series, 2):
        assert math.dist(lab(first, VISION[vision]), lab(second, VISION[vision])) > 10, (first, second)


def test_dark_mode_replaces_each_colour_of_a_drawing():
    drawing = "".join(f'<path style="stroke: {colour}"/>' for colour in LIGHT.colours.values())
    expected = "".join(f'<path style="stroke: {colour}"/>' for colour in DARK.colours.values())
    assert for_dark_mode(drawing + "#ABCDEF #abcdef0") == expected + "#ABCDEF #abcdef0"
    assert len(set(LIGHT.colours.values())) == len(LIGHT.colours)  # Otherwise two colours would become one.
