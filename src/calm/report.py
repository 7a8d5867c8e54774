"""Figures and samples of a run: as a table on the terminal, and as one self-contained HTML file."""

import base64
import html
import io
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from calm.core.brier import NUM_ORDERS
from calm.errors import InputError
from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.flops import Cost


@dataclass(frozen=True)
class Sample:
    """A continuation that the model wrote.

    Args:
        prompt: The text it was given.
        continuation: What it wrote.
        truth: How the text goes on in the corpus.
    """

    prompt: str
    continuation: str
    truth: str


def print_scorecard(card: Scorecard) -> None:
    """Print the figures of a model on held-out text."""
    console = Console()
    if card.reconstruction is not None:
        rec = card.reconstruction
        console.print(
            f"reconstruction  {rec.token_accuracy:.3%} of tokens, {rec.chunk_accuracy:.3%} of chunks "
            f"(from a posterior draw: {rec.token_accuracy_noisy:.3%} of tokens)",
            highlight=False,
        )
    if card.perplexity is not None:
        per = card.perplexity
        console.print(
            f"perplexity  {per.perplexity:.3f} ({per.cross_entropy:.4f} nats per token, "
            f"{per.num_tokens:,} tokens)",
            highlight=False,
        )
    console.print(_caption(card.brier), highlight=False)
    table = Table("", *_COLUMNS, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # Narrow enough for 80 columns.
    for name, result in _rows(card):
        table.add_row(name, *_cells(result))
    console.print(table)


def print_costs(title: str, one: Cost, many: Cost | None, draws: float) -> None:
    """Print what a model costs, by part.

    Args:
        title: What is counted.
        one: With one draw a chunk.
        many: With the draws of low temperature; None for a model that needs no more than one.
        draws: How many those are.
    """
    columns: dict[str, Mapping[str, float]] = {
        "parameters": one.parameters,
        "training": one.training,
        "inference, T = 1": one.inference,
    }
    if many is not None:
        columns[f"with {draws:g} draws"] = many.inference
    table = Table("", *columns)
    for part in dict.fromkeys(part for column in columns.values() for part in column):
        table.add_row(part, *(_si(column[part]) if part in column else "" for column in columns.values()))
    table.add_section()
    table.add_row("all", *(_si(sum(column.values())) for column in columns.values()))
    console = Console(highlight=False)
    console.print(title)
    console.print(table)


def _si(number: float) -> str:
    """Three digits and a unit: 2.91e8 is 291 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def write_report(
    path: Path,
    title: str,
    card: Scorecard,
    history: dict[str, list[dict[str, Any]]],
    samples: Sequence[Sample],
    recipe: str,
) -> None:
    """Write the HTML report; plots are inside it as images.

    Args:
        path: The file.
        title: Its heading.
        card: Held-out figures.
        history: Logged figures of each stage, as the Trainer keeps them.
        samples: What the model wrote.
        recipe: The resolved recipe as text.

    Raises:
        InputError: If matplotlib is missing.
    """
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in _cells(result))}</tr>"
        for name, result in _rows(card)
    )
    rec = card.reconstruction
    if rec is None:
        raise ValueError("the report of a run needs the reconstruction of its autoencoder.")
    written = "".join(
        f"<article><p><b>{html.escape(s.prompt)}</b>{html.escape(s.continuation)}</p>"
        f"<p class=truth>in the corpus: …{html.escape(s.truth)}</p></article>"
        for s in samples
    )
    page = _PAGE.substitute(
        title=html.escape(title),
        style=_STYLE,
        tokens=f"{rec.token_accuracy:.3%}",
        chunks=f"{rec.chunk_accuracy:.3%}",
        noisy=f"{rec.token_accuracy_noisy:.3%}",
        std=f"{rec.posterior_std:.2f}",
        caption=html.escape(_caption(card.brier)),
        columns="".join(f"<th>{column}</th>" for column in _COLUMNS),
        rows=rows,
        plot=base64.b64encode(_plot(history, card)).decode(),
        written=written,
        recipe=html.escape(recipe),
    )
    path.write_text(page, encoding="utf-8")


def read_history(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The logged figures of a run."""
    return json.loads(path.read_text(encoding="utf-8"))


_COLUMNS = ("BrierLM", *(f"Brier-{n}" for n in range(1, NUM_ORDERS + 1)))
_PAGE = string.Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>$style</style>
<h1>$title</h1>
<h2>Held-out text</h2>
<p>The autoencoder gives back $tokens of tokens and $chunks of chunks;
from a draw of its posterior (standard deviation $std), $noisy of tokens.</p>
<table><caption>$caption</caption>
<tr><th></th>$columns</tr>
$rows
</table>
<h2>Training</h2>
<img alt="training curves" src="data:image/png;base64,$plot">
<h2>What it writes</h2>
<p>Continuations (plain) of held-out beginnings (bold).</p>
$written
<h2>Recipe</h2>
<pre>$recipe</pre>
</html>
""")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
table { border-collapse: collapse } caption { text-align: left; color: #555; padding-bottom: .4rem }
th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
tr th:first-child { text-align: left }
img { max-width: 100% } article { border-left: 3px solid #4269d0; padding-left: 1rem; margin: 1rem 0 }
.truth { color: #777; font-size: .9em }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .85em }
"""


def _caption(result: BrierResult) -> str:
    return (
        f"T = 1, {result.num_chunks:,} held-out chunks, blocks of {result.context} tokens, "
        "in percent ± standard error"
    )


def _rows(card: Scorecard) -> list[tuple[str, BrierResult]]:
    return [
        *card.floors.items(),
        (card.name, card.brier),
        *((f"ceiling: {n}", r) for n, r in card.ceilings.items()),
    ]


def _cells(result: BrierResult) -> list[str]:
    pairs = zip(result.as_metrics().values(), result.as_errors().values(), strict=True)
    return [f"{value:.2f}±{error:.2f}" for value, error in pairs]


def _plot(history: dict[str, list[dict[str, Any]]], card: Scorecard) -> bytes:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the report needs matplotlib; pip install 'calm-lm[report]'.") from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    exact = {"eval_token_accuracy": "tokens", "eval_chunk_accuracy": "chunks"}
    panels: list[tuple[Any, str, dict[str, str], str, dict[str, BrierResult]]] = [
        (axes[0][0], "autoencoder", {"loss": "training"}, "autoencoder: loss per chunk (nats)", {}),
        (axes[0][1], "autoencoder", exact, "autoencoder: given back exactly (%), held-out", {}),
        (axes[1][0], "language_model", {"loss": "training"}, "language model: energy loss", {}),
        (axes[1][1], "language_model", {"eval_brier_lm": "CALM"}, "BrierLM, held-out", card.floors),
    ]
    for axis, stage, lines, label, floors in panels:
        for key, name in lines.items():
            points = [(entry["step"], entry[key]) for entry in history.get(stage, []) if key in entry]
            axis.plot(*zip(*points, strict=True), marker="." if key.startswith("eval") else None, label=name)
        for (name, result), style in zip(floors.items(), ("--", ":", "-."), strict=False):
            axis.axhline(result.brier_lm, color="gray", linestyle=style, label=name)
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
        if len(lines) + len(floors) > 1:
            axis.legend()
    axes[0][1].set_ylim(top=100.2)
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    return image.getvalue()
