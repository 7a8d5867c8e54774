"""Several models side by side: a table, plots against cost, and texts, as one self-contained HTML file."""

import html
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from calm.core.brier import brier_lm_difference
from calm.evaluation.brier import BrierResult
from calm.report.figures import write_figures
from calm.report.measured import Comparison, ModelResult
from calm.report.pages import image_of, page_of, table_of
from calm.report.plots import have_cross_entropies, plot_costs, plot_cross_entropies, plot_warmths
from calm.report.tables import BRIER_COLUMNS, cells_of, narrow_table, short, with_error
from calm.storage.disk import write_file_whole

_COSTS = (
    "parameters, tokens that the autoencoder reconstructs, perplexity, FLOPs and time of training, "
    "FLOPs per token that is written at two temperatures, draws a chunk at the lower"
)


def print_comparison(comparison: Comparison) -> None:
    """Print the table."""
    console = Console(highlight=False)
    for caption, (columns, rows) in (
        (comparison.protocol, _scores(comparison)),
        (_COSTS, _costs(comparison)),
    ):
        console.print(caption)
        console.print(narrow_table(["", *columns], [[name, *cells] for name, cells in rows]))


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the HTML report, and beside it all figures as .json and the plots as .png.

    Raises:
        InputError: If matplotlib is missing.
    """
    write_figures(asdict(comparison, dict_factory=_without_documents), path.with_suffix(".json"))
    tables = "".join(
        table_of(caption, columns, rows)
        for caption, (columns, rows) in (
            (comparison.protocol, _scores(comparison)),
            (_COSTS, _costs(comparison)),
        )
    )
    names = "".join(f"<th>{html.escape(c.name)}</th>" for c in comparison.results)
    texts = "".join(
        f"<tr><td colspan={len(comparison.results)}><b>{html.escape(prompt)}</b></td></tr><tr>"
        + "".join(f"<td>…{html.escape(c.texts[number])}</td>" for c in comparison.results)
        + "</tr>"
        for number, prompt in enumerate(comparison.prompts)
    )
    plots = [
        ("Quality against cost", "cost", plot_costs),
        ("Accuracy against collision", "collision", plot_warmths),
    ]
    if have_cross_entropies(comparison):
        plots.append(("BrierLM against cross-entropy", "cross_entropy", plot_cross_entropies))
    images = "".join(
        f"<h2>{title}</h2>{image_of(plot(comparison), title, path.with_name(f'{path.stem}_{name}.png'))}"
        for title, name, plot in plots
    )
    body = (
        f"{tables}{images}"
        f"<h2>Texts at T = {comparison.temperature:g}</h2><table class=texts><tr>{names}</tr>{texts}</table>"
    )
    write_file_whole(path, page_of("Models side by side", body))


def _scores(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[str]]]]:
    results = comparison.floors | {c.name: c.card.brier for c in comparison.results}
    best = _best(comparison)
    columns = [*BRIER_COLUMNS, f"to {best.name}"]
    return columns, [
        (name, [*cells_of(result), _difference(result, best.card.brier)]) for name, result in results.items()
    ]


def _best(comparison: Comparison) -> ModelResult:
    """The best of the models whose windows most of the others have too."""

    def rank(one: ModelResult) -> tuple[int, float, float]:
        brier = one.card.brier
        num_pairs = sum(_are_paired(brier, other.card.brier) for other in comparison.results)
        return num_pairs, brier.brier_lm, brier.means[0]  # Those without BrierLM by Brier-1.

    return max(comparison.results, key=rank)


def _are_paired(one: BrierResult, other: BrierResult) -> bool:
    """Whether two scores are of the same windows."""
    if one.documents is None or other.documents is None:
        return False
    return one.documents.pairs_with(other.documents)


def _difference(result: BrierResult, best: BrierResult) -> str:
    """How far BrierLM lies from the best model's, with the error of that; nothing for that model itself.

    And nothing where windows differ, as for chunks of eight tokens beside four, or a score is undefined.
    """
    if result is best or not _are_paired(result, best) or result.undefined or best.undefined:
        return ""
    assert result.documents and best.documents
    return with_error(*brier_lm_difference(result.documents, best.documents), sign="+").replace(" ", "")


def _without_documents(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields for the file of figures: the sums of single documents are too many."""
    return {name: value for name, value in items if name != "documents"}


def _costs(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Parameters, tokens reconstructed by the autoencoder, perplexity, FLOPs, time, draws a chunk."""
    temperature = comparison.temperature
    low = f"T = {temperature:g}"
    columns = ["size", "exact", "ppl", "training", "time", "T = 1", low, "draws"]
    rows = []
    for c in comparison.results:
        back, perplexity, cold = c.card.reconstruction, c.card.perplexity, c.at(temperature)
        rows.append(
            (
                c.name,
                [
                    short(c.parameters),
                    f"{back.token_accuracy:.2%}" if back else "",
                    f"{perplexity.perplexity:.2f}" if perplexity else "",
                    short(c.training_flops) if c.training_flops else "",
                    f"{c.seconds / 60:.1f} min" if c.seconds else "",
                    short(c.at(1.0).flops),
                    short(cold.flops),
                    f"{cold.draws:.0f}",
                ],
            )
        )
    return columns, rows
