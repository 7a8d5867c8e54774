"""The tables and the figure of thoughts.py: right answers by hops, for each way of leaving out steps."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from measure import error_of_mean

from calm.report.panels import new_figure

SHOWN = {
    "cot": "steps written",
    "no_cot": "no steps, no curriculum",
    "no_cot_longer": "no steps, no curriculum, three times as long",
    "drop": "steps left out",
    "drop_longer": "steps left out, stages three times as long",
    "pause": "pauses",
    "thoughts": "thoughts",
    "pause_longer": "pauses, stages three times as long",
    "thoughts_longer": "thoughts, stages three times as long",
    "at_once": "thoughts, no curriculum",
    "supervised": "supervised thoughts",
    "supervised_pause": "supervised pauses",
    "supervised_longer": "supervised thoughts, three times as long",
    "supervised_pause_longer": "supervised pauses, three times as long",
}


def share(right: str) -> float:
    """Percentage of ones in a string of ones and zeros."""
    return round(100 * right.count("1") / len(right), 1)


CHANGES = {"removed": "removed", "swapped": "of another question", "noise": "noise of their size"}


def lines_of(rows: list[dict[str, Any]]) -> dict[str, tuple[list[dict[str, Any]], str]]:
    """Label of a line of the table -> the rows of its way, and the name of the answers that it shows."""
    lines = {}
    for way, label in SHOWN.items():
        same_way = [row for row in rows if row["way"] == way]
        if not same_way:
            continue
        lines[label] = (same_way, "as trained")
        if way.removesuffix("_longer") in ("thoughts", "supervised"):
            lines |= {f"{label}, then {words}": (same_way, name) for name, words in CHANGES.items()}
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """Percentages of right answers by hops, with standard errors over seeds, and the cost of an answer."""
    hops = list(rows[0]["hops"])
    most = hops[-1]
    text = [f"| hops | {' | '.join(hops)} | backbone steps | tokens written | training FLOPs |"]
    text.append("|---" * (len(hops) + 4) + "|")
    for label, (same_way, name) in lines_of(rows).items():
        cells = [
            with_error([share(row["hops"][number]["answers"][name]) for row in same_way]) for number in hops
        ]
        first = same_way[0]
        hardest = first["hops"][most]
        num_thoughts = 0 if name == "removed" else first["thoughts"]
        steps = hardest["backbone_steps"] - first["thoughts"] + num_thoughts
        cells += [f"{steps:.0f}", f"{hardest['written_tokens']:.0f}", f"{first['training_flops']:.1e}"]
        text.append(f"| {label} | {' | '.join(cells)} |")
    pairs = (("thoughts", "pause"), ("supervised", "supervised_pause"))
    for suffix, (first_way, second_way) in itertools.product(("", "_longer"), pairs):
        first_way, second_way = first_way + suffix, second_way + suffix
        only_first, only_second = disagreements(rows, first_way, second_way)
        if only_first + only_second:
            z = (only_first - only_second) / (only_first + only_second) ** 0.5
            text.append(
                f"\n{SHOWN[first_way]} against {SHOWN[second_way]}: right alone on {only_first} and "
                f"{only_second} questions, z = {z:.1f} (McNemar)"
            )
    return "\n".join(text)


def summary(rows: list[dict[str, Any]]) -> str:
    """Percentages of right answers to a task's questions with the most hops, for all kinds of models."""
    kinds = [kind for kind in NAMES if any(row["kind"] == kind for row in rows)]
    most = list(rows[0]["hops"])[-1]
    text = [f"| {most} hops | {' | '.join(NAMES[kind] for kind in kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    lines_of_kinds = [lines_of([row for row in rows if row["kind"] == kind]) for kind in kinds]
    for label in lines_of(rows):
        cells = []
        for lines in lines_of_kinds:
            same_way, name = lines.get(label, ([], ""))
            cells.append(with_error([share(row["hops"][most]["answers"][name]) for row in same_way]))
        text.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(text)


def with_error(values: list[float]) -> str:
    """Mean and standard error over seeds; empty without values."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.0f}"
    return f"{mean:.0f} ± {error_of_mean(values):.0f}"


def disagreements(rows: list[dict[str, Any]], first_way: str, second_way: str) -> tuple[int, int]:
    """Numbers of questions that only one of two ways answers, over all hops above 1 and all common seeds."""
    by_run = {(row["way"], row["seed"]): row for row in rows}
    counts = [0, 0]
    for way, seed in by_run:
        if way != first_way or (second_way, seed) not in by_run:
            continue
        for hops in rows[0]["hops"]:
            if hops == "1":
                continue
            answers = [
                by_run[name, seed]["hops"][hops]["answers"]["as trained"] for name in (first_way, second_way)
            ]
            for first, second in zip(*answers, strict=True):
                counts[0] += first > second
                counts[1] += first < second
    return counts[0], counts[1]


DRAWN = [way for way in SHOWN if not way.endswith("_longer")]
COLORS = ("black", *(f"C{index}" for index in range(len(DRAWN) - 1)))
NAMES = {"llama": "Llama", "K1": "K = 1", "K2": "K = 2", "K4": "K = 4"}
CHANCE = {"path": 25, "chain": 100 / 7, "graph": 50}


def draw(rows: list[dict[str, Any]], figure: Path) -> None:
    """Plot accuracy against hops: a row of panels per task, a column per kind of model."""
    tasks = [task for task in CHANCE if any(row["task"] == task for row in rows)]
    drawing = new_figure(2.7 * len(NAMES), 2.3 * len(tasks) + 0.7)
    panels = drawing.subplots(len(tasks), len(NAMES), squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for (row_index, task), (column, kind) in itertools.product(enumerate(tasks), enumerate(NAMES)):
        axes = panels[row_index][column]
        chosen = [row for row in rows if (row["task"], row["kind"]) == (task, kind)]
        if not chosen:
            axes.set_axis_off()
            continue
        handles |= draw_panel(axes, chosen)
        axes.axhline(CHANCE[task], color="gray", linestyle=":", linewidth=1)
        axes.set(title=f"{task}, {NAMES[kind]}", ylim=(-3, 104))
        if row_index == len(tasks) - 1:
            axes.set_xlabel("hops")
        if column == 0:
            axes.set_ylabel("right answers, %")
    labels = [label for label in SHOWN.values() if label in handles]
    drawing.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", ncols=4, frameon=False
    )
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure.with_suffix(".png"), dpi=140, facecolor="white")


def draw_panel(axes: Axes, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw one line per way, and return the lines by label."""
    lines: dict[str, Any] = {}
    for index, way in enumerate(DRAWN):
        same_way = [row for row in rows if row["way"] == way]
        if not same_way:
            continue
        hops = [int(number) for number in same_way[0]["hops"]]
        shares = [
            [share(row["hops"][str(number)]["answers"]["as trained"]) for row in same_way] for number in hops
        ]
        means, errors = (
            [statistics.mean(values) for values in shares],
            [error_of_mean(values) for values in shares],
        )
        x = [
            number + (index - (len(DRAWN) - 1) / 2) / 40 for number in hops
        ]  # Shifted: many points coincide.
        style: dict[str, Any] = {
            "marker": "osD^v<>PX*"[index],
            "color": COLORS[index],
            "capsize": 2,
            "markersize": 5,
        }
        lines[SHOWN[way]] = axes.errorbar(x, means, errors, **style)
        axes.set_xticks(hops)
    return lines
