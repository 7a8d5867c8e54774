"""Plots of a comparison: quality against cost, accuracy against collision, BrierLM against cross-entropy."""

import itertools
import math
import statistics
from typing import Any

from calm.core.brier import NUM_ORDERS
from calm.report.measured import Comparison, ModelResult
from calm.report.pages import new_figure

_FEWEST_CHECKPOINTS = 3  # Two always lie on a line.


def plot_costs(comparison: Comparison) -> Any:
    """BrierLM against training and inference FLOPs, and against time.

    Where a model has none, because one of its factors is not positive, all are shown by Brier-1.
    """
    figure, low = new_figure(11, 8), comparison.temperature
    axes = figure.subplots(2, 2).flatten()
    labels = (
        "training: FLOPs, autoencoder included",
        "training: minutes, autoencoder included",
        "inference at T = 1: FLOPs per token",
        f"inference at T = {low:g}: FLOPs per token",
    )
    results = [*comparison.floors.values(), *(c.card.brier for c in comparison.results)]
    metric = "brier_1" if any(result.undefined for result in results) else "brier_lm"
    for number, c in enumerate(comparison.results):
        brier, colour = c.card.brier, f"C{number}"
        y, error = brier.as_metrics()[metric], brier.as_errors().get(metric, math.nan)
        xs = (c.training_flops, c.seconds and c.seconds / 60, c.at(1.0).flops, c.at(low).flops)
        passed = [point for point in c.checkpoints if getattr(point, metric) is not None]
        if passed:
            ys = [getattr(point, metric) for point in passed]
            axes[0].plot([point.flops for point in passed], ys, color=colour, alpha=0.5)
        for axis, x in zip(axes, xs, strict=True):
            if x:
                axis.errorbar([x], [y], yerr=[error], fmt="o", color=colour, label=c.name, capsize=3)
    name_of = {"brier_lm": "BrierLM", "brier_1": "Brier-1, since BrierLM is undefined for some"}
    for axis, label in zip(axes, labels, strict=True):
        for (name, floor), style in zip(
            comparison.floors.items(), itertools.cycle(("--", ":", "-.")), strict=False
        ):
            axis.axhline(floor.as_metrics()[metric], color="gray", linestyle=style, label=name)
        axis.set(xlabel=label, ylabel=f"{name_of[metric]}\n(held-out, T = 1)", xscale="log")
        axis.grid(alpha=0.3)
    axes[1].set(xscale="linear")
    axes[1].set_xlim(left=0)
    axes[2].legend(fontsize="small")  # Every model has a cost of inference.
    return figure


def plot_warmths(comparison: Comparison) -> Any:
    """Probability to be right against the probability that two samples agree, from T = 1 downwards."""
    figure = new_figure(11, 4.6)
    for axis, order in zip(figure.subplots(1, 2), (1, NUM_ORDERS), strict=True):
        for number, c in enumerate(comparison.results):
            points = [(100 * w.collisions[order - 1], 100 * w.hits[order - 1]) for w in c.temperature_points]
            axis.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=c.name)
            for end in (0, -1):  # All of them would cover each other.
                near = {"xytext": (4, -9), "textcoords": "offset points", "fontsize": 8}
                axis.annotate(f"T = {c.temperature_points[end].temperature:.2g}", points[end], **near)
        token = "next token" if order == 1 else f"next {order} tokens"
        axis.set(
            xlabel=f"collision: two samples agree in the {token} (%)",
            ylabel=f"accuracy: a sample is right in the {token} (%)",
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    temperatures = ", ".join(f"{point.temperature:.2g}" for point in comparison.results[0].temperature_points)
    figure.suptitle(f"Along each line the temperature falls: {temperatures}.", fontsize="small")
    return figure


def have_cross_entropies(comparison: Comparison) -> bool:
    """Whether any model has checkpoints that `plot_cross_entropies` can show."""
    return any(_cross_entropies(c) for c in comparison.results)


def plot_cross_entropies(comparison: Comparison) -> Any:
    """BrierLM against cross-entropy over the checkpoints of each run, with their correlation."""
    figure = new_figure(7, 4.6)
    axis = figure.subplots()
    for number, c in enumerate(comparison.results):
        if points := _cross_entropies(c):
            correlation = statistics.correlation(*zip(*points, strict=True))
            label = f"{c.name}: {len(points)} checkpoints, correlation {correlation:.3f}"
            axis.plot(*zip(*points, strict=True), "o", color=f"C{number}", label=label)
    axis.set(xlabel="cross-entropy (nats per token, held-out)", ylabel="BrierLM (held-out, T = 1)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def _cross_entropies(result: ModelResult) -> list[tuple[float, float]]:
    """(cross-entropy, BrierLM) at the checkpoints, if there are enough."""
    points = [
        (point.cross_entropy, point.brier_lm)
        for point in result.checkpoints
        if point.cross_entropy is not None and point.brier_lm is not None
    ]
    # A correlation needs figures that differ.
    enough = len({x for x, _ in points}) >= _FEWEST_CHECKPOINTS and len({y for _, y in points}) > 1
    return points if enough else []
