"""Plots of a comparison: quality against cost, accuracy against collision, BrierLM against cross-entropy."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from calm.core.brier import NUM_ORDERS
from calm.report.axes import (
    Entry,
    draw_floors,
    entry_of_floor,
    entry_of_series,
    series_style,
    spread_log_x,
    spread_x,
)
from calm.report.measured import Comparison, ModelResult
from calm.report.names import with_names
from calm.report.palette import LIGHT
from calm.report.panels import Panel

_MIN_CHECKPOINTS = 3  # Two always lie on a line.
_LONG = 7200  # Longer times, in seconds, are shown in hours.


def metric_of(comparison: Comparison) -> str:
    """The metric to plot: BrierLM, or Brier-1 if any model's BrierLM is undefined."""
    results = [*comparison.floors.values(), *(result.card.brier for result in comparison.results)]
    return "brier_1" if any(result.undefined for result in results) else "brier_lm"


@dataclass(frozen=True)
class _Cost:
    """A cost to plot scores against.

    Args:
        title: Its name.
        label: Its unit.
        of: The cost of a model; None if unknown.
        is_linear: Whether its axis is linear from 0 instead of logarithmic.
        with_checkpoints: Whether to also plot the checkpoints of each model.
    """

    title: str
    label: str
    of: Callable[[ModelResult], float | None]
    is_linear: bool = False
    with_checkpoints: bool = False


def cost_panels(comparison: Comparison) -> list[Panel]:
    """Held-out scores against training FLOPs, training time, and FLOPs per generated token.

    Costs that are unknown for all models, such as the training of bare model folders, are left out.
    """
    longest = max((result.seconds or 0 for result in comparison.results), default=0)
    unit, length = ("hours", 3600) if longest > _LONG else ("minutes", 60)
    is_complete = not any(result.excluded for result in comparison.results)
    included = "autoencoder included" if is_complete else "what a run trained"
    costs = [
        _Cost("Training FLOPs", f"FLOPs, {included}", lambda r: r.training_flops, with_checkpoints=True),
        _Cost(
            "Training time",
            f"{unit}, {included}",
            lambda r: None if r.seconds is None else r.seconds / length,
            is_linear=True,
        ),
    ]
    for temperature in dict.fromkeys((1.0, comparison.temperature)):
        of = partial(ModelResult.flops_at, temperature=temperature)
        costs.append(_Cost(f"Writing at T = {temperature:g}", "FLOPs per token", of))
    return [
        Panel(cost.title, partial(_draw_cost, comparison, cost))
        for cost in costs
        if any(cost.of(result) for result in comparison.results)
    ]


def _draw_cost(comparison: Comparison, cost: _Cost, axis: Any) -> None:
    metric, costs = metric_of(comparison), []
    draw_floors(axis, {name: floor.as_metrics()[metric] for name, floor in comparison.floors.items()})
    for number, (name, result) in enumerate(with_names(comparison)):
        if not (x := cost.of(result)):
            continue
        brier, style = result.card.brier, series_style(number)
        y, error = brier.as_metrics()[metric], brier.as_errors().get(metric, math.nan)
        checkpoints = [
            (point.flops, getattr(point, metric))
            for point in result.checkpoints
            if cost.with_checkpoints and getattr(point, metric) is not None
        ]
        if checkpoints:
            axis.plot(*zip(*checkpoints, strict=True), color=style["color"], alpha=0.5)
        axis.errorbar([x], [y], yerr=[error], color=style["color"], fmt="none", capsize=3)
        axis.plot([x], [y], linestyle="", label=name, **style)
        costs += [x, *(flops for flops, _ in checkpoints)]
    if cost.is_linear:
        spread_x(axis, cost.label, from_zero=True)
    else:
        spread_log_x(axis, cost.label, costs)
    axis.set_ylabel("BrierLM" if metric == "brier_lm" else "Brier-1 (%)")


def collision_panels(comparison: Comparison) -> list[Panel]:
    """Probability of being right against the probability that two samples agree, from T = 1 down."""
    return [
        Panel(
            "The next token" if order == 1 else f"The next {order} tokens",
            partial(_draw_collisions, comparison, order),
        )
        for order in (1, NUM_ORDERS)
    ]


def _draw_collisions(comparison: Comparison, order: int, axis: Any) -> None:
    for number, (name, result) in enumerate(with_names(comparison)):
        points = [(100 * p.collisions[order - 1], 100 * p.hits[order - 1]) for p in result.temperature_points]
        style = series_style(number)
        axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.plot(*points[0], **style, markerfacecolor=LIGHT.paper, markersize=7, zorder=3)
    spread_x(axis, "two samples agree (%)", from_zero=False)
    axis.set_ylabel("a sample is right (%)")


def legend_of(comparison: Comparison) -> list[Entry]:
    """The legend shared by all panels of a comparison."""
    models = enumerate(name for name, _ in with_names(comparison))
    floors = enumerate(comparison.floors)
    return [*(entry_of_series(*model) for model in models), *(entry_of_floor(*floor) for floor in floors)]


def cross_entropy_panels(comparison: Comparison) -> list[Panel]:
    """BrierLM against cross-entropy over the checkpoints of each run that has both."""
    if not any(_cross_entropies(result) for result in comparison.results):
        return []
    return [Panel("Checkpoints of each run", partial(_draw_cross_entropies, comparison))]


def correlations(comparison: Comparison) -> list[str]:
    """A sentence per run on how BrierLM and cross-entropy correlate over checkpoints, if it has both."""
    sentences = []
    for name, result in with_names(comparison):
        if points := _cross_entropies(result):
            correlation = statistics.correlation(*zip(*points, strict=True))
            sentences.append(f"{name}: correlation {correlation:.3f} over {len(points)} checkpoints.")
    return sentences


def _draw_cross_entropies(comparison: Comparison, axis: Any) -> None:
    for number, (name, result) in enumerate(with_names(comparison)):
        if points := _cross_entropies(result):
            axis.plot(*zip(*points, strict=True), linestyle="", label=name, **series_style(number))
    spread_x(axis, "cross-entropy (nats per token)", from_zero=False)
    axis.set_ylabel("BrierLM")


def _cross_entropies(result: ModelResult) -> list[tuple[float, float]]:
    """(cross-entropy, BrierLM) at the checkpoints, if there are enough."""
    points = [
        (point.cross_entropy, point.brier_lm)
        for point in result.checkpoints
        if point.cross_entropy is not None and point.brier_lm is not None
    ]
    # A correlation needs values that differ.
    is_enough = len({x for x, _ in points}) >= _MIN_CHECKPOINTS and len({y for _, y in points}) > 1
    return points if is_enough else []
