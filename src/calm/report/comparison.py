"""Several models side by side: tables, plots against cost, and samples, as one self-contained HTML file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from calm.core.brier import brier_lm_difference
from calm.evaluation.brier import BrierResult
from calm.quantities import duration, short
from calm.report.figures import write_figures
from calm.report.measured import Comparison, ModelResult
from calm.report.names import with_names
from calm.report.pages import Table, page_of
from calm.report.panels import Panel, Picture, picture_of, write_png
from calm.report.plots import (
    collision_panels,
    correlations,
    cost_panels,
    cross_entropy_panels,
    legend_of,
    metric_of,
)
from calm.report.run import brier_figure
from calm.report.tables import BRIER_COLUMNS, cells_of, costs_exclude, print_narrow, spaced, with_error
from calm.storage.disk import write_atomically


@dataclass(frozen=True)
class _Group:
    """Plots under one heading, with a description."""

    title: str
    text: Sequence[str]
    pictures: Sequence[Picture]


def print_comparison(comparison: Comparison) -> None:
    """Print the tables, with models named by their runs to fit in 80 columns."""
    console, runs = Console(highlight=False), [result.name for result in comparison.results]
    console.print(comparison.protocol)
    scores = _scores(comparison, runs)
    print_narrow(console, scores.columns, scores.rows)
    console.print(
        "parameters, tokens reconstructed by the autoencoder, perplexity, training FLOPs and time, "
        "FLOPs per generated token at two temperatures, draws per chunk at the lower"
    )
    low = f"T = {comparison.temperature:g}"
    columns = ["", "size", "exact", "ppl", "training", "time", "T = 1", low, "draws"]
    rows = [[run, *cells] for run, cells in zip(runs, _costs(comparison), strict=True)]
    print_narrow(console, columns, rows)
    for sentence in costs_exclude(zip(runs, (result.excluded for result in comparison.results), strict=True)):
        console.print(sentence)


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the HTML report, and next to it all figures as .json and the plots as .png.

    Raises:
        InputError: If matplotlib is missing.
    """
    write_figures(asdict(comparison, dict_factory=_json_fields), path.with_suffix(".json"))
    groups = []
    for name, title, text, panels in _plots(comparison):
        write_png(panels, path.with_name(f"{path.stem}_{name}.png"))
        groups.append(_Group(title, text, [picture_of(panel, legend=False) for panel in panels]))
    models = with_names(comparison)
    names = [name for name, _ in models]
    page = page_of(
        "comparison.html",
        title="Models side by side",
        comparison=comparison,
        figures=[brier_figure(result.card, name) for name, result in models],
        names=names,
        results=models,
        scores=_for_page(_scores(comparison, names)),
        costs=_table_of_costs(comparison, names),
        groups=groups,
        entries=legend_of(comparison),
        temperature=f"{comparison.temperature:g}",
        recipes=[(name, result.recipe) for name, result in models if result.recipe is not None],
    )
    write_atomically(path, page)


def _plots(comparison: Comparison) -> list[tuple[str, str, list[str], list[Panel]]]:
    """File name, heading, sentences and panels of each nonempty group of plots."""
    ends = [point.temperature for point in comparison.results[0].temperature_points]
    metric = "BrierLM" if metric_of(comparison) == "brier_lm" else "Brier-1 (BrierLM is undefined for some)"
    groups = [
        (
            "cost",
            "Quality against cost",
            [
                f"{metric} on held-out text at T = 1, with its standard error. A line shows a model's "
                "scores during training.",
                *_exclusions(comparison),
            ],
            cost_panels(comparison),
        ),
        (
            "collision",
            "Accuracy against collision",
            [
                "How often a sample is right, against how often two samples agree. Along each line the "
                f"temperature falls from T = {ends[0]:.2g} (open marker) to {ends[-1]:.2g}."
            ],
            collision_panels(comparison),
        ),
        (
            "cross_entropy",
            "BrierLM against cross-entropy",
            [
                "Models with probabilities, on the held-out blocks that are scored during training.",
                *correlations(comparison),
            ],
            cross_entropy_panels(comparison),
        ),
    ]
    return [group for group in groups if group[-1]]


def _scores(comparison: Comparison, names: Sequence[str]) -> Table:
    best = _best(comparison)
    name_of_best = names[comparison.results.index(best)]
    models = zip(names, comparison.results, strict=True)
    scores = [*comparison.floors.items(), *((name, result.card.brier) for name, result in models)]
    rows = [[name, *cells_of(score), _difference(score, best.card.brier)] for name, score in scores]
    columns = ["", *BRIER_COLUMNS, f"to {name_of_best}"]
    return Table(comparison.protocol, columns, rows).without_empty_columns()


def _for_page(table: Table) -> Table:
    """A table of the terminal, with the spaces that a page has room for."""
    return replace(table, rows=[list(map(spaced, row)) for row in table.rows])


def _best(comparison: Comparison) -> ModelResult:
    """The best model among those that share their windows with the most others."""

    def rank(result: ModelResult) -> tuple[int, float, float]:
        brier = result.card.brier
        num_pairs = sum(_are_paired(brier, other.card.brier) for other in comparison.results)
        return num_pairs, brier.brier_lm, brier.means[0]  # Brier-1 ranks models whose BrierLM is undefined.

    return max(comparison.results, key=rank)


def _are_paired(first: BrierResult, second: BrierResult) -> bool:
    """Whether two scores are on the same windows."""
    if first.documents is None or second.documents is None:
        return False
    return first.documents.pairs_with(second.documents)


def _difference(result: BrierResult, best: BrierResult) -> str:
    """Difference to the best model's BrierLM, with its standard error; empty for that model itself.

    Also empty if the windows differ, as for chunks of eight and four tokens, or if a score is undefined.
    """
    if result is best or not _are_paired(result, best) or result.undefined or best.undefined:
        return ""
    assert result.documents and best.documents
    return with_error(*brier_lm_difference(result.documents, best.documents), sign="+").replace(" ", "")


def _json_fields(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields for the JSON file, without per-document sums and recipes."""
    values = {name: value for name, value in items if name not in ("documents", "recipe")}
    if (date := values.get("date")) is not None:
        values["date"] = date.isoformat(timespec="seconds")
    return values


def _exclusions(comparison: Comparison) -> list[str]:
    return costs_exclude((name, result.excluded) for name, result in with_names(comparison))


def _table_of_costs(comparison: Comparison, names: Sequence[str]) -> Table:
    low = f"T\u00a0=\u00a0{comparison.temperature:g}"  # Non-breaking spaces keep it on one line.
    columns = ["", "run", "parameters", "reconstruction", "perplexity", "training FLOPs", "training time"]
    columns += ["FLOPs per token, T\u00a0=\u00a01", f"FLOPs per token, {low}", f"draws per chunk, {low}"]
    runs = [result.name for result in comparison.results]
    rows = [[name, run, *row] for name, run, row in zip(names, runs, _costs(comparison), strict=True)]
    caption = "Parameters include all parts; FLOPs and time include all stages of a run."
    caption = " ".join([caption, *_exclusions(comparison)])
    return Table(caption, columns, rows, num_names=2).without_empty_columns()


def _costs(comparison: Comparison) -> list[list[str]]:
    """Per model: parameters, tokens reconstructed, perplexity, costs of training and generation, draws."""
    rows = []
    for result in comparison.results:
        card, low = result.card, result.at(comparison.temperature)
        rows.append(
            [
                short(result.parameters),
                f"{card.reconstruction.token_accuracy:.2%}" if card.reconstruction else "",
                f"{card.perplexity.perplexity:.2f}" if card.perplexity else "",
                short(result.training_flops) if result.training_flops is not None else "",
                duration(result.seconds) if result.seconds is not None else "",
                short(result.at(1.0).flops),
                short(low.flops),
                f"{low.draws:.0f}",
            ]
        )
    return rows
