"""Self-contained HTML pages, from the templates beside this file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from calm.report.palette import DARK, LIGHT

_TEMPLATES = Environment(
    loader=PackageLoader("calm.report"),
    autoescape=True,  # Texts of models and names of folders are plain text, whatever they look like.
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Figure:
    """A key figure, as it stands at the top of a page.

    Args:
        name: What it is.
        value: The figure, with its unit.
        error: Its standard error.
        note: What it is measured by, or why there is none.
    """

    name: str
    value: str
    error: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table: columns of names, which are aligned to the left, then columns of numbers.

    Args:
        caption: What it shows.
        columns: Headings, those of the names included.
        rows: Texts of the cells.
        num_names: Columns of names.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1

    def without_empty_columns(self) -> "Table":
        """The table without numbers that are known of no row."""
        kept = [
            place
            for place in range(len(self.columns))
            if place < self.num_names or any(row[place] for row in self.rows)
        ]
        columns = [self.columns[place] for place in kept]
        return replace(self, columns=columns, rows=[[row[place] for place in kept] for row in self.rows])


def page_of(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: File name of its template.
        **values: What the template shows; strings are plain text.
    """
    return _TEMPLATES.get_template(template).render(light=LIGHT, dark=DARK, **values)
