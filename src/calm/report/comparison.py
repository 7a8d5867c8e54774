"""Several models side by side: a table, plots against cost, and texts, as one self-contained HTML file."""

import html
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from calm.core.brier import NUM_ORDERS
from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.report.pages import image_of, new_figure, page_of, table_of
from calm.report.tables import BRIER_COLUMNS, cells_of, short

_COSTS = (
    "parameters, tokens that the autoencoder gives back, perplexity, operations and time of training, "
    "operations per token that is written at two temperatures, draws a chunk at the lower"
)


@dataclass(frozen=True)
class Warmth:
    """A model at one temperature.

    Args:
        temperature: T.
        hits: Chance to draw the text's own next 1..4 tokens.
        collisions: Chance that two samples agree in their next 1..4 tokens.
        draws: Draws that one sample of a chunk takes in the mean; 1 for a model with probabilities.
        flops: Operations per token that is written, draws included.
    """

    temperature: float
    hits: tuple[float, ...]
    collisions: tuple[float, ...]
    draws: float
    flops: float


@dataclass(frozen=True)
class Contender:
    """What is known of one model.

    Args:
        name: Of its run.
        chunk_size: Tokens per chunk K; 1 for a model of tokens.
        parameters: Of all parts.
        card: Held-out figures.
        training_flops: Operations of its training, autoencoder included; None if it is not known.
        seconds: Time its training took.
        curve: (operations, BrierLM) at the evaluations during training.
        warmths: At several temperatures, T = 1 first.
        texts: How it continues the prompts.
    """

    name: str
    chunk_size: int
    parameters: int
    card: Scorecard
    training_flops: float | None
    seconds: float | None
    curve: list[tuple[float, float]]
    warmths: list[Warmth]
    texts: list[str]

    def at(self, temperature: float) -> Warmth:
        """Its figures at one of the temperatures."""
        return next(warmth for warmth in self.warmths if warmth.temperature == temperature)


@dataclass(frozen=True)
class Comparison:
    """Models that were scored on the same text.

    Args:
        contenders: The models.
        floors: N-gram models.
        temperature: The low temperature at which texts were written and costs are shown.
        prompts: What the texts continue.
        protocol: One line that says how it was scored.
    """

    contenders: list[Contender]
    floors: dict[str, BrierResult]
    temperature: float
    prompts: list[str]
    protocol: str


def print_comparison(comparison: Comparison) -> None:
    """Print the table."""
    console = Console(highlight=False)
    for caption, (columns, rows) in (
        (comparison.protocol, _scores(comparison)),
        (_COSTS, _costs(comparison)),
    ):
        console.print(caption)
        table = Table("", *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name, cells in rows:
            table.add_row(name, *cells)
        console.print(table)


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the HTML report, and all figures beside it as .json.

    Raises:
        InputError: If matplotlib is missing.
    """
    tables = "".join(
        table_of(caption, columns, rows)
        for caption, (columns, rows) in (
            (comparison.protocol, _scores(comparison)),
            (_COSTS, _costs(comparison)),
        )
    )
    names = "".join(f"<th>{html.escape(c.name)}</th>" for c in comparison.contenders)
    texts = "".join(
        f"<tr><td colspan={len(comparison.contenders)}><b>{html.escape(prompt)}</b></td></tr><tr>"
        + "".join(f"<td>…{html.escape(c.texts[number])}</td>" for c in comparison.contenders)
        + "</tr>"
        for number, prompt in enumerate(comparison.prompts)
    )
    body = (
        f"{tables}<h2>Quality against cost</h2>{image_of(_cost_plots(comparison), 'BrierLM against cost')}"
        f"<h2>Accuracy against collision</h2>{image_of(_warmth_plots(comparison), 'accuracy and collision')}"
        f"<h2>Texts at T = {comparison.temperature:g}</h2><table class=texts><tr>{names}</tr>{texts}</table>"
    )
    path.write_text(page_of("Models side by side", body), encoding="utf-8")
    figures = json.dumps(_without_nan(asdict(comparison)), indent=1, allow_nan=False)
    path.with_suffix(".json").write_text(figures + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """The same with null for errors that are not known, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _scores(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[str]]]]:
    rows = [(name, cells_of(result)) for name, result in comparison.floors.items()]
    rows += [(contender.name, cells_of(contender.card.brier)) for contender in comparison.contenders]
    return list(BRIER_COLUMNS), rows


def _costs(comparison: Comparison) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Parameters, tokens given back by the autoencoder, perplexity, operations, time, draws a chunk."""
    temperature = comparison.temperature
    low = f"T = {temperature:g}"
    columns = ["size", "exact", "ppl", "training", "time", "T = 1", low, "draws"]
    rows = []
    for c in comparison.contenders:
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


def _cost_plots(comparison: Comparison) -> Any:
    """BrierLM against training and inference operations, and against time."""
    figure, low = new_figure(11, 8), comparison.temperature
    axes = figure.subplots(2, 2).flatten()
    labels = (
        "training, operations",
        "training, minutes",
        "inference at T = 1, operations per token",
        f"inference at T = {low:g}, operations per token",
    )
    for number, c in enumerate(comparison.contenders):
        y, error, colour = c.card.brier.brier_lm, c.card.brier.brier_lm_error, f"C{number}"
        xs = (c.training_flops, c.seconds and c.seconds / 60, c.at(1.0).flops, c.at(low).flops)
        if c.curve:
            axes[0].plot(*zip(*c.curve, strict=True), color=colour, alpha=0.5)
        for axis, x in zip(axes, xs, strict=True):
            if x:
                axis.errorbar([x], [y], yerr=[error], fmt="o", color=colour, label=c.name, capsize=3)
    for axis, label in zip(axes, labels, strict=True):
        for (name, floor), style in zip(comparison.floors.items(), ("--", ":", "-."), strict=False):
            axis.axhline(floor.brier_lm, color="gray", linestyle=style, label=name)
        axis.set(xlabel=label, ylabel="BrierLM (held-out, T = 1)", xscale="log")
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize="small")  # Every model has a cost of inference.
    return figure


def _warmth_plots(comparison: Comparison) -> Any:
    """Chance to be right against chance that two samples agree, from T = 1 downwards."""
    figure = new_figure(11, 4.6)
    for axis, order in zip(figure.subplots(1, 2), (1, NUM_ORDERS), strict=True):
        for number, c in enumerate(comparison.contenders):
            points = [(100 * w.collisions[order - 1], 100 * w.hits[order - 1]) for w in c.warmths]
            axis.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=c.name)
            for warmth, point in zip(c.warmths, points, strict=True):
                near = {"xytext": (4, -9), "textcoords": "offset points", "fontsize": 7}
                axis.annotate(f"{warmth.temperature:.2g}", point, **near)
        token = "next token" if order == 1 else f"next {order} tokens"
        axis.set(
            xlabel=f"collision: two samples agree in the {token} (%)",
            ylabel=f"accuracy: a sample is right in the {token} (%)",
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle("Numbers at the points are temperatures.", fontsize="small")
    return figure
