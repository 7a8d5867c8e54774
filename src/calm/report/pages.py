"""Self-contained HTML pages with plots inside."""

import base64
import html
import io
import string
from pathlib import Path
from typing import Any

from calm.errors import InputError

_PAGE = string.Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>$style</style>
<h1>$title</h1>
$body
</html>
""")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; color: #555; padding-bottom: .4rem }
th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
tr th:first-child { text-align: left }
img { max-width: 100% } article { border-left: 3px solid #4269d0; padding-left: 1rem; margin: 1rem 0 }
.truth { color: #777; font-size: .9em }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .85em }
"""


def page_of(title: str, body: str) -> str:
    """A page with a title; the body is HTML."""
    return _PAGE.substitute(title=html.escape(title), style=_STYLE, body=body)


def table_of(caption: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A table whose rows have names; all texts are plain."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f"<table><caption>{html.escape(caption)}</caption><tr><th></th>{head}</tr>{body}</table>"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches.

    Raises:
        InputError: If matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the report needs matplotlib; pip install 'calm-lm[report]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def image_of(figure: Any, description: str, copy: Path | None = None) -> str:
    """A figure as an image that is part of the page, and in a file of its own if one is named."""
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    if copy:
        copy.write_bytes(image.getvalue())
    data = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
