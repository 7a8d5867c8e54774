"""Plots of one run: losses and held-out scores over the steps of its stages."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from calm.evaluation.held_out import Scorecard
from calm.report.axes import draw_floors, series_style, spread_x
from calm.report.facts import AUTOENCODER, LANGUAGE_MODEL
from calm.report.panels import Panel

History = dict[str, list[dict[str, Any]]]
"""Logged metrics of each stage, as the Trainer keeps them."""
_Lines = dict[str, list[tuple[float, float]]]  # Label -> (step, value) points.


def panels_of_run(history: History, card: Scorecard, has_loss_in_nats: bool = True) -> list[Panel]:
    """Panels of the logged metrics; none for stages that were not logged.

    Args:
        history: The logged metrics.
        card: The final scores.
        has_loss_in_nats: Whether the loss of a language model with a perplexity is its cross-entropy.
    """
    autoencoder, model = (history.get(stage, []) for stage in (AUTOENCODER, LANGUAGE_MODEL))
    accuracy = {
        "tokens": _points(autoencoder, "eval_token_accuracy"),
        "chunks": _points(autoencoder, "eval_chunk_accuracy"),
    }
    nats = "nats per token"
    loss = f"loss ({nats})" if card.perplexity is not None and has_loss_in_nats else "loss of the head"
    scores, metric, floors = _scores_during_training(model, card)
    metric_label = metric if metric == "BrierLM" else f"{metric} (%)"
    panels = [
        ("Autoencoder: training loss", "loss (nats per chunk)", {"": _points(autoencoder, "loss")}, {}),
        ("Autoencoder: reconstruction of held-out text", "reconstructed exactly (%)", accuracy, {}),
        ("Language model: training loss", loss, {"": _points(model, "loss")}, {}),
        (f"Language model: {metric}", metric_label, {"this model": scores}, floors),
        (
            "Language model: cross-entropy of held-out text",
            f"cross-entropy ({nats})",
            {"": _points(model, "eval_cross_entropy")},
            {},
        ),
    ]
    return [
        Panel(title, partial(_draw, label, lines, heights))
        for title, label, lines, heights in panels
        if any(lines.values())
    ]


def _draw(label: str, lines: _Lines, floors: Mapping[str, float], axis: Any) -> None:
    draw_floors(axis, dict(floors))
    for number, (name, points) in enumerate(lines.items()):
        style = series_style(number)
        if len(points) > 25:  # Markers would merge into a band.
            style.pop("marker")
        axis.plot(*zip(*points, strict=True), label=name, **style)
    axis.set_ylabel(label)
    spread_x(axis, "step", from_zero=True)


def _points(log: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in log if key in entry]


def _scores_during_training(
    log: list[dict[str, Any]], card: Scorecard
) -> tuple[list[tuple[float, float]], str, dict[str, float]]:
    """Scores during training, the metric, and n-gram scores: BrierLM if defined at the end, else Brier-1."""
    points = _points(log, "eval_brier_lm")
    if card.brier.undefined or not points or not points[-1][1] > 0:
        floors = {name: floor.as_metrics()["brier_1"] for name, floor in card.floors.items()}
        return _points(log, "eval_brier_1"), "Brier-1", floors
    floors = {name: floor.brier_lm for name, floor in card.floors.items() if not floor.undefined}
    return [(step, score) for step, score in points if score > 0], "BrierLM", floors
