"""Colours of pages and plots, in a light and a dark scheme.

Text has a contrast of at least 4.5 with its background, plot lines at least 3 (WCAG 2.2, AA). The
colours of series are also distinguishable with protanopia and deuteranopia (tests/report/test_palette.py).
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """Colours by purpose, as #rrggbb.

    Args:
        paper: Background of the page.
        surface: Background of figures and code.
        ink: Text.
        muted: Captions, axis labels, and floors.
        line: Rules and grids.
        accent: Links and focused elements.
        series: Plot lines.
    """

    paper: str
    surface: str
    ink: str
    muted: str
    line: str
    accent: str
    series: tuple[str, ...]

    @property
    def colours(self) -> dict[str, str]:
        """Colours by name; the series are numbered."""
        series = {f"series-{number}": colour for number, colour in enumerate(self.series)}
        plain = {name: colour for name, colour in vars(self).items() if name != "series"}
        return {**plain, **series}


LIGHT = Palette(
    paper="#ffffff",
    surface="#f5f7f9",
    ink="#1a1f26",
    muted="#57616c",
    line="#d8dee4",
    accent="#0b5cc2",
    series=("#0b62c4", "#e3411f", "#10a28a", "#92368f", "#747516", "#3d3d3d"),
)
DARK = Palette(
    paper="#14171c",
    surface="#1d2229",
    ink="#e8ebef",
    muted="#a3adb8",
    line="#353c46",
    accent="#7ab8ff",
    series=("#4ea3ff", "#ff8a5c", "#2fc9a8", "#cd8ad1", "#e8c745", "#c9d9ea"),
)


def for_dark_mode(drawing: str) -> str:
    """Replace the colours of `LIGHT` in a drawing with those of `DARK`."""
    dark_of = dict(zip(LIGHT.colours.values(), DARK.colours.values(), strict=True))
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: dark_of.get(match[0], match[0]), drawing)
