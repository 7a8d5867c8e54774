"""An ablation as a table: on the terminal, as Markdown, and as JSON."""

import html
import math
import statistics
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from calm.core.brier import NUM_ORDERS, undefined_brier_lm
from calm.quantities import duration, short
from calm.report.figures import write_figures
from calm.report.measured import NATS, AblationTable, Outcome
from calm.report.tables import costs_exclude, print_narrow, with_error
from calm.storage.disk import write_atomically


def print_ablation(table: AblationTable) -> None:
    """Print the table, without the columns that do not fit on an 80-column terminal."""
    console = Console(highlight=False)
    console.print(table.question)
    columns, rows = _cells(table)
    shown = [i for i, column in enumerate(columns) if column not in ("parameters", "training time")]
    head, *body = [[cells[i] for i in shown] for cells in (columns, *rows)]
    print_narrow(console, head, body)


def write_ablation(table: AblationTable, path: Path) -> None:
    """Write the table as Markdown, with the recipe collapsed, and all figures as .json next to it."""
    columns, rows = _cells(table)
    lines = [columns, [":---", *["---:"] * (len(columns) - 1)], *rows]
    body = "\n".join(f"| {' | '.join(map(_plain, cells))} |" for cells in lines)
    note = (
        f"BrierLM on held-out text in blocks of {table.context} tokens, layout {table.layout}, T = 1, "
        "percent ± standard error over documents; one column for each seed."
    )
    excluded = costs_exclude((outcome.name, outcome.excluded) for outcome in table.outcomes)
    note = _plain(" ".join([note, *excluded]))
    words = " · ".join(table.provenance.words)
    summary = "<summary>What is common to all runs</summary>"
    recipe = f"<details>\n{summary}\n\n```yaml\n{table.recipe}```\n\n</details>"
    parts = [_plain(table.question), words, body, note, recipe]
    write_atomically(path, "\n\n".join(filter(None, parts)) + "\n")
    # No date, so that the table of the same runs is always the same file.
    figures = {name: value for name, value in asdict(table).items() if name not in ("recipe", "provenance")}
    write_figures(figures, path.with_suffix(".json"))


def _plain(text: str) -> str:
    """Escape a text so that Markdown shows it verbatim, on one line."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _cells(table: AblationTable) -> tuple[list[str], list[list[str]]]:
    seeds = [f"seed {seed}" for seed in table.seeds]
    costs = ["parameters", "training FLOPs", "training time"]
    nats = ["nats a token"] if all(map(_has_nats, table.outcomes)) else []
    columns = ["", *seeds, "mean", "Brier-1", *nats, "tokens reconstructed", *costs, "in the paper"]
    rows = []
    for outcome in table.outcomes:
        rows.append(
            [
                outcome.name,
                *map(_brier_lm, outcome.scores),
                _mean(outcome.scores),
                f"{statistics.mean(score['brier_1'] for score in outcome.scores):.2f}",
                *([f"{statistics.mean(score[NATS] for score in outcome.scores):.3f}"] if nats else []),
                f"{statistics.mean(score['token_accuracy'] for score in outcome.scores):.2f}%",
                short(outcome.parameters),
                short(outcome.training_flops),
                _time(outcome.seconds),
                "" if outcome.published is None else f"{outcome.published:.2f}",
            ]
        )
    return columns, rows


def _has_nats(outcome: Outcome) -> bool:
    return all(NATS in score for score in outcome.scores)


def _brier_lm(score: dict[str, float]) -> str:
    """BrierLM of one seed with its standard error, or why it is undefined."""
    undefined = undefined_brier_lm([score[f"brier_{order}"] for order in range(1, NUM_ORDERS + 1)])
    return f"undefined: {undefined}" if undefined else with_error(score["brier_lm"], score["error"])


def _mean(scores: list[dict[str, float]]) -> str:
    """Mean over seeds with its standard error, if BrierLM is defined for all."""
    values = [score["brier_lm"] for score in scores]
    if not min(values) > 0:
        return f"undefined for {sum(not value > 0 for value in values)} of {len(values)}"
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return with_error(statistics.mean(values), error)


def _time(seconds: list[float | None]) -> str:
    """Mean over seeds, if known for all."""
    known = [time for time in seconds if time is not None]
    return duration(statistics.mean(known)) if known and len(known) == len(seconds) else ""
