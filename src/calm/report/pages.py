"""Self-contained HTML pages, from the templates in this folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from calm.report.palette import DARK, LIGHT

_TEMPLATES = Environment(
    loader=PackageLoader("calm.report"),
    autoescape=True,  # Generated texts and folder names are plain text, whatever they look like.
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Figure:
    """A key figure at the top of a page.

    Args:
        name: Its name.
        value: Its value, with the unit.
        error: Its standard error.
        note: A remark, such as a reference value or why there is no figure.
    """

    name: str
    value: str
    error: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table: left-aligned columns of names, then columns of numbers.

    Args:
        caption: Its caption.
        columns: Headings of all columns.
        rows: Cells of each row, as text.
        num_names: Number of name columns.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1

    def without_empty_columns(self) -> "Table":
        """The table without number columns that are empty in every row."""
        kept = [i for i in range(len(self.columns)) if i < self.num_names or any(row[i] for row in self.rows)]
        columns = [self.columns[i] for i in kept]
        return replace(self, columns=columns, rows=[[row[i] for i in kept] for row in self.rows])


def page_of(template: str, **values: Any) -> str:
    """Render a page.

    Args:
        template: File name of the template.
        **values: Values for the template; strings are plain text.
    """
    return _TEMPLATES.get_template(template).render(light=LIGHT, dark=DARK, **values)
