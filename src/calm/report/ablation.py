"""An ablation as a table: on the terminal, as Markdown, and as figures."""

import math
import statistics
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from calm.report.figures import write_figures
from calm.report.measured import AblationTable
from calm.report.tables import short, with_error


def print_ablation(table: AblationTable) -> None:
    """Print the table."""
    console = Console(highlight=False)
    console.print(table.question)
    columns, rows = _cells(table)
    shown = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def write_ablation(table: AblationTable, path: Path) -> None:
    """Write the table as Markdown, and beside it all figures as .json."""
    columns, rows = _cells(table)
    lines = [columns, ["---"] * len(columns), *rows]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    note = (
        f"BrierLM on held-out text in blocks of {table.context} tokens, layout documents, T = 1, "
        "percent ± standard error over documents; one column for each seed."
    )
    path.write_text(f"{table.question}\n\n{body}\n\n{note}\n", encoding="utf-8")
    write_figures(asdict(table), path.with_suffix(".json"))


def _cells(table: AblationTable) -> tuple[list[str], list[list[str]]]:
    seeds = [f"seed {seed}" for seed in table.seeds]
    columns = ["", *seeds, "mean", "Brier-1", "tokens given back", "operations", "in the paper"]
    rows = []
    for outcome in table.outcomes:
        scores = [score["brier_lm"] for score in outcome.scores]
        spread = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
        rows.append(
            [
                outcome.name,
                *(with_error(score["brier_lm"], score["error"]) for score in outcome.scores),
                with_error(statistics.mean(scores), spread),
                f"{statistics.mean(score['brier_1'] for score in outcome.scores):.2f}",
                f"{statistics.mean(score['token_accuracy'] for score in outcome.scores):.2%}",
                short(outcome.operations),
                "" if outcome.published is None else f"{outcome.published:.2f}",
            ]
        )
    return columns, rows
