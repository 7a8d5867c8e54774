"""The table and the figure of ladder.py: nats and BrierLM against training FLOPs, with fits."""

import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import error_over_seeds, sums_of
from scipy.stats import linregress

from calm.core.brier import brier_lm_difference
from calm.report.panels import new_figure
from calm.report.tables import with_error

LABELS = {
    "baseline": "Transformer",
    "sequential_K2": "sequential head, K = 2",
    "sequential_K4": "sequential head, K = 4",
    "sequential_K8": "sequential head, K = 8",
    "classes_K2": "64 classes, K = 2",
    "classes_K4": "64 classes, K = 4",
    "classes_K1": "64 classes, K = 1",
}
Row = dict[str, Any]


def report(rows: list[Row], floor: dict[str, Any]) -> str:
    """A table of all models, with scores of the chosen ones; the n-gram models; and the fits."""
    scored = chosen(rows)
    lines = [
        "| model | FLOPs | width | seed | tokens read | FLOPs a token | nats to choose by | nats | BrierLM "
        "| to the Transformer | min |",
        "|" + "---|" * 11,
    ]
    for row in sorted(rows, key=_order):
        is_scored = "brier_lm" in row
        lines.append(
            f"| {LABELS[row['kind']]} | {row['budget']:.0e} "
            f"| {row['width']} | {row['seed']} | {row['training_tokens'] / 1e6:.1f} M "
            f"| {row['inference_flops'] / 1e6:.2f} M | {row['nats_to_choose_by']:.3f} "
            f"| {format(row['nats'], '.3f') if is_scored else ''} "
            f"| {with_error(row['brier_lm'], row['error']) if is_scored else ''} "
            f"| {_difference(row, scored)} | {row['seconds'] / 60:.0f} |"
        )
    lines += ["", "| n-gram model of the training text | nats | BrierLM | Brier-1 to 4 |", "|" + "---|" * 4]
    for name, scores in floor.items():
        score = "undefined" if scores["error"] is None else with_error(scores["brier_lm"], scores["error"])
        orders = ", ".join(f"{mean:.2f}" for mean in scores["brier"])
        lines.append(f"| {name} | {scores['nats']:.3f} | {score} | {orders} |")
    lines.append("")
    for kind in LABELS:
        for name in ("nats", "brier_lm"):
            if (line := fit([row for row in scored if row["kind"] == kind], name)) is not None:
                slope, error, _ = line
                lines.append(f"{LABELS[kind]}: {name} {slope:+.3f} ± {error:.3f} for ten times the FLOPs")
    lines += ["", *comparisons(scored), "", *savings(scored)]
    return "\n".join(lines)


def chosen(rows: list[Row]) -> list[Row]:
    """Scored rows whose width is the best of their kind and budget, by the first seed's nats to choose by."""
    best: dict[tuple[str, float], Row] = {}
    first_seed = min(row["seed"] for row in rows)
    for row in rows:
        key = row["kind"], row["budget"]
        is_better = key not in best or row["nats_to_choose_by"] < best[key]["nats_to_choose_by"]
        if row["seed"] == first_seed and is_better:
            best[key] = row
    return [
        row
        for row in rows
        if "brier_lm" in row
        and (choice := best.get((row["kind"], row["budget"]))) is not None
        and row["width"] == choice["width"]
    ]


def fit(rows: list[Row], name: str) -> tuple[float, float, Callable[[float], float]] | None:
    """Fit a straight line to a score against the logarithm of FLOPs, by least squares.

    Returns:
        The slope per factor of ten in FLOPs, its standard error (infinite for two points), and the line as a
        function of FLOPs; None for fewer than two budgets.
    """
    if len({row["budget"] for row in rows}) < 2:
        return None
    line = linregress([math.log10(row["training_flops"]) for row in rows], [row[name] for row in rows])
    error = line.stderr if len(rows) > 2 else math.inf
    return line.slope, error, lambda flops: line.intercept + line.slope * math.log10(flops)


def comparisons(scored: list[Row]) -> list[str]:
    """For each kind and score, the line of its differences to the Transformer, and where that is zero."""
    baseline = {(row["budget"], row["seed"]): row for row in scored if row["kind"] == "baseline"}
    lines = []
    for kind in LABELS:
        pairs = [
            (row, baseline[row["budget"], row["seed"]])
            for row in scored
            if row["kind"] == kind != "baseline" and (row["budget"], row["seed"]) in baseline
        ]
        if len({row["budget"] for row, _ in pairs}) < 3:
            continue
        budgets = [row["budget"] for row, _ in pairs]
        for name in ("nats", "brier_lm"):
            difference = line_of_differences(budgets, [row[name] - other[name] for row, other in pairs])
            lines.append(f"{LABELS[kind]}, to the Transformer: {name} {difference}")
    return lines


def line_of_differences(budgets: list[float], differences: list[float]) -> str:
    """Slope of a difference per factor of ten in FLOPs, and where its line crosses zero.

    The standard error of the crossing is from the delta method on the line through the points' center. Lines
    whose slope is less than two standard errors from zero have no such place that one could tell.
    """
    logarithms = [math.log10(budget) for budget in budgets]
    line = linregress(logarithms, differences)
    slope = f"{line.slope:+.3f} ± {line.stderr:.3f} for ten times the FLOPs"
    if abs(line.slope) < 2 * line.stderr:
        mean = statistics.mean(differences)
        return f"{slope}: none that can be told from zero, on average {mean:+.3f}"
    center, height = statistics.mean(logarithms), statistics.mean(differences)
    crossing = -line.intercept / line.slope
    residuals = [
        difference - line.intercept - line.slope * x
        for x, difference in zip(logarithms, differences, strict=True)
    ]
    variance_of_mean = sum(residual**2 for residual in residuals) / (len(residuals) - 2) / len(residuals)
    error = math.sqrt(variance_of_mean + ((crossing - center) * line.stderr) ** 2) / abs(line.slope)
    low, high = 10 ** (crossing - error), 10 ** (crossing + error)
    side = "inside" if min(budgets) <= 10**crossing <= max(budgets) else "outside"
    return (
        f"{slope}, {height:+.3f} on average; zero at {10**crossing:.1e} ({low:.1e} to {high:.1e}), "
        f"{side} what was trained"
    )


def savings(scored: list[Row]) -> list[str]:
    """For each kind and score, the share of the Transformer's FLOPs after which it scores as well."""
    lines = []
    for kind in LABELS:
        for name in ("nats", "brier_lm"):
            baseline, model = (
                _means([row for row in scored if row["kind"] == which], name) for which in ("baseline", kind)
            )
            shares = [
                f"{flops / budget:.2f} at {budget:.0e}"
                for budget, score in baseline.items()
                if (flops := flops_for(score, model)) is not None
            ]
            if shares and kind != "baseline":
                lines.append(f"{LABELS[kind]}, FLOPs for the Transformer's {name}: {', '.join(shares)}")
    return lines


def flops_for(score: float, score_by_flops: dict[float, float]) -> float | None:
    """FLOPs after which a model has a score, interpolated in their logarithm; None outside what was trained.

    Args:
        score: The score.
        score_by_flops: Scores of the model, by FLOPs in ascending order.
    """
    for (flops, low), (more_flops, high) in pairwise(score_by_flops.items()):
        if min(low, high) <= score <= max(low, high) and low != high:
            return flops * (more_flops / flops) ** ((score - low) / (high - low))
    return None


def _means(rows: list[Row], name: str) -> dict[float, float]:
    """Mean score over seeds, by budget."""
    budgets = sorted({row["budget"] for row in rows})
    return {
        budget: statistics.mean(row[name] for row in rows if row["budget"] == budget) for budget in budgets
    }


def draw(rows: list[Row], figure: Path) -> None:
    """Plot nats and BrierLM against FLOPs and minutes: means over seeds, and the fits.

    Minutes are those of the machine that most models were trained on.
    """
    scored = chosen(rows)
    machine = statistics.mode(row["machine"] for row in scored)
    drawing = new_figure(12, 8)
    panels = drawing.subplots(2, 2)
    columns: tuple[tuple[str, list[Row], Callable[[Row], float]], ...] = (
        ("training FLOPs", scored, lambda row: row["training_flops"]),
        (
            f"minutes on {machine.partition(' of ')[2]}",
            [row for row in scored if row["machine"] == machine],
            lambda row: row["seconds"] / 60,
        ),
    )
    for column, (label, shown, x_of) in enumerate(columns):
        for axes, name in zip(panels[:, column], ("nats", "brier_lm"), strict=True):
            for index, kind in enumerate(LABELS):
                of_kind = [row for row in shown if row["kind"] == kind]
                points = []
                for budget in sorted({row["budget"] for row in of_kind}):
                    same = [row for row in of_kind if row["budget"] == budget]
                    values = [row[name] for row in same]
                    errors = [row["error"] if name == "brier_lm" else 0.0 for row in same]
                    cost = statistics.mean(map(x_of, same))
                    points.append((cost, statistics.mean(values), error_over_seeds(values, errors)))
                if not points:
                    continue
                x, y, error = zip(*points, strict=True)
                axes.errorbar(
                    x,
                    y,
                    yerr=error,
                    marker="o",
                    capsize=3,
                    linestyle="",
                    color=f"C{index}",
                    label=LABELS[kind],
                )
                if column == 0 and (line := fit(of_kind, name)) is not None:
                    axes.plot(x, [line[2](flops) for flops in x], color=f"C{index}", linewidth=1)
            axes.set(xlabel=label, xscale="log", ylabel="nats per token" if name == "nats" else "BrierLM")
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure.with_suffix(".png"), dpi=120, facecolor="white")


def _order(row: Row) -> tuple[int, float, int, int]:
    return list(LABELS).index(row["kind"]), row["budget"], row["width"], row["seed"]


def _difference(row: Row, scored: list[Row]) -> str:
    """BrierLM minus that of the Transformer with the same seed and FLOPs, with documents paired."""
    for other in scored:
        is_match = (other["budget"], other["seed"]) == (row["budget"], row["seed"])
        if "brier_lm" in row and is_match and other["kind"] == "baseline" != row["kind"]:
            sums, baseline = sums_of(row["documents"]), sums_of(other["documents"])
            if not sums.pairs_with(baseline):
                return ""
            return with_error(*brier_lm_difference(sums, baseline), "+")
    return ""
