"""The report of one run, as one self-contained HTML file."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.report.pages import image_of, new_figure, page_of, table_of
from calm.report.tables import BRIER_COLUMNS, caption_of, cells_of, rows_of
from calm.storage.disk import read_json, write_file_whole

History = dict[str, list[dict[str, Any]]]
"""Logged figures of each stage, as the Trainer keeps them."""


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


def write_report(
    path: Path,
    title: str,
    card: Scorecard,
    history: History,
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
    rec = card.reconstruction
    if rec is None:
        raise ValueError("the report of a run needs the reconstruction of its autoencoder.")
    written = "".join(
        f"<article><p><b>{html.escape(s.prompt)}</b>{html.escape(s.continuation)}</p>"
        f"<p class=truth>in the corpus: …{html.escape(s.truth)}</p></article>"
        for s in samples
    )
    rows = [(name, cells_of(result)) for name, result in rows_of(card)]
    body = f"""<h2>Held-out text</h2>
<p>The autoencoder reconstructs {rec.token_accuracy:.3%} of tokens and {rec.chunk_accuracy:.3%} of chunks;
from a draw of its posterior (standard deviation {rec.posterior_std:.2f}),
{rec.token_accuracy_noisy:.3%} of tokens.</p>
{table_of(caption_of(card.brier), list(BRIER_COLUMNS), rows)}
<h2>Training</h2>
{image_of(_plot(history, card), "training curves")}
<h2>What it writes</h2>
<p>Continuations (plain) of held-out beginnings (bold).</p>
{written}
<h2>Recipe</h2>
<pre>{html.escape(recipe)}</pre>"""
    write_file_whole(path, page_of(title, body))


def read_history(path: Path) -> History:
    """The logged figures of a run.

    Raises:
        InputError: If they are damaged.
    """
    return read_json(path, dict)


def _plot(history: History, card: Scorecard) -> Any:
    exact = {"eval_token_accuracy": "tokens", "eval_chunk_accuracy": "chunks"}
    panels: list[tuple[str, dict[str, str], str, dict[str, BrierResult]]] = [
        ("autoencoder", {"loss": "training"}, "autoencoder: loss per chunk (nats)", {}),
        ("autoencoder", exact, "autoencoder: reconstructed exactly (%), held-out", {}),
        ("language_model", {"loss": "training"}, "language model: loss of the head", {}),
        ("language_model", *_scores_on_the_way(history, card)),
    ]
    panels = [panel for panel in panels if panel[0] in history]  # Codes of tokens are not trained.
    rows = len(panels) // 2
    figure = new_figure(11, 3.5 * rows)
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis, (stage, lines, label, floors) in zip(axes, panels, strict=True):
        for key, name in lines.items():
            points = [(entry["step"], entry[key]) for entry in history[stage] if key in entry]
            points = [point for point in points if key != "eval_brier_lm" or point[1] > 0]
            axis.plot(*zip(*points, strict=True), marker="." if key.startswith("eval") else None, label=name)
        for (name, result), style in zip(floors.items(), ("--", ":", "-."), strict=False):
            metric = next(iter(lines)).removeprefix("eval_")
            axis.axhline(result.as_metrics()[metric], color="gray", linestyle=style, label=name)
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
        if len(lines) + len(floors) > 1:
            axis.legend()
        if lines is exact:
            axis.set_ylim(top=100.2)
    return figure


def _scores_on_the_way(
    history: History, card: Scorecard
) -> tuple[dict[str, str], str, dict[str, BrierResult]]:
    """BrierLM where it is defined in the end, else Brier-1: key and name, title, and floors."""
    known = [entry["eval_brier_lm"] for entry in history["language_model"] if "eval_brier_lm" in entry]
    if card.brier.undefined or not known or not known[-1] > 0:
        return {"eval_brier_1": "CALM"}, "Brier-1, held-out (BrierLM is undefined)", card.floors
    floors = {name: result for name, result in card.floors.items() if not result.undefined}
    return {"eval_brier_lm": "CALM"}, "BrierLM, held-out", floors
