"""An ablation as a table: on the terminal, as Markdown, and as figures."""

import math
import statistics
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from calm.core.brier import NUM_ORDERS, undefined_brier_lm
from calm.report.figures import write_figures
from calm.report.measured import AblationTable
from calm.report.tables import narrow_table, short, with_error
from calm.storage.disk import write_file_whole


def print_ablation(table: AblationTable) -> None:
    """Print the table."""
    console = Console(highlight=False)
    console.print(table.question)
    console.print(narrow_table(*_cells(table)))


def write_ablation(table: AblationTable, path: Path) -> None:
    """Write the table as Markdown, and beside it all figures as .json."""
    columns, rows = _cells(table)
    lines = [columns, ["---"] * len(columns), *rows]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    note = (
        f"BrierLM on held-out text in blocks of {table.context} tokens, layout documents, T = 1, "
        "percent ± standard error over documents; one column for each seed."
    )
    write_file_whole(path, f"{table.question}\n\n{body}\n\n{note}\n")
    write_figures(asdict(table), path.with_suffix(".json"))


def _cells(table: AblationTable) -> tuple[list[str], list[list[str]]]:
    seeds = [f"seed {seed}" for seed in table.seeds]
    columns = ["", *seeds, "mean", "Brier-1", "tokens reconstructed", "training FLOPs", "in the paper"]
    rows = []
    for outcome in table.outcomes:
        rows.append(
            [
                outcome.name,
                *map(_brier_lm, outcome.scores),
                _mean(outcome.scores),
                f"{statistics.mean(score['brier_1'] for score in outcome.scores):.2f}",
                f"{statistics.mean(score['token_accuracy'] for score in outcome.scores):.2%}",
                short(outcome.training_flops),
                "" if outcome.published is None else f"{outcome.published:.2f}",
            ]
        )
    return columns, rows


def _brier_lm(score: dict[str, float]) -> str:
    """BrierLM of a seed with its error, or why it is undefined."""
    undefined = undefined_brier_lm([score[f"brier_{order}"] for order in range(1, NUM_ORDERS + 1)])
    return f"undefined: {undefined}" if undefined else with_error(score["brier_lm"], score["error"])


def _mean(scores: list[dict[str, float]]) -> str:
    """Mean over the seeds with its standard error, where BrierLM is defined for all."""
    values = [score["brier_lm"] for score in scores]
    if not min(values) > 0:
        return f"undefined for {sum(not value > 0 for value in values)} of {len(values)}"
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return with_error(statistics.mean(values), spread)
