"""The table and the figure of thoughts.py: right answers by hops, for each way of leaving steps out."""

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
    """Percent of ones."""
    return round(100 * right.count("1") / len(right), 1)


CHANGES = {"removed": "removed", "swapped": "of another question", "noise": "noise of their size"}


def lines_of(rows: list[dict[str, Any]]) -> dict[str, tuple[list[dict[str, Any]], str]]:
    """What has a line in the table: rows of a way, and which of their answers."""
    lines = {}
    for way, shown in SHOWN.items():
        of_way = [row for row in rows if row["way"] == way]
        if not of_way:
            continue
        lines[shown] = (of_way, "as trained")
        if way.removesuffix("_longer") in ("thoughts", "supervised"):
            lines |= {f"{shown}, then {words}": (of_way, name) for name, words in CHANGES.items()}
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """Percent of right answers by hops, with the standard error over seeds, and what an answer takes."""
    hops = list(rows[0]["hops"])
    most = hops[-1]
    text = [f"| hops | {' | '.join(hops)} | backbone steps | tokens written | training FLOPs |"]
    text.append("|---" * (len(hops) + 4) + "|")
    for shown, (of_way, name) in lines_of(rows).items():
        cells = [with_error([share(row["hops"][one]["answers"][name]) for row in of_way]) for one in hops]
        last, flops = of_way[0]["hops"][most], of_way[0]["training_flops"]
        thought = 0 if name == "removed" else of_way[0]["thoughts"]
        steps = last["backbone_steps"] - of_way[0]["thoughts"] + thought
        taken = [f"{steps:.0f}", f"{last['written_tokens']:.0f}", f"{flops:.1e}"]
        text.append(f"| {shown} | {' | '.join([*cells, *taken])} |")
    pairs = (("thoughts", "pause"), ("supervised", "supervised_pause"))
    for one, other in ((one + longer, other + longer) for longer in ("", "_longer") for one, other in pairs):
        only_one, only_other = disagreements(rows, one, other)
        if only_one + only_other:
            z = (only_one - only_other) / (only_one + only_other) ** 0.5
            text.append(
                f"\n{SHOWN[one]} against {SHOWN[other]}: right alone on {only_one} and {only_other} "
                f"questions, z = {z:.1f} (McNemar)"
            )
    return "\n".join(text)


def summary(rows: list[dict[str, Any]]) -> str:
    """Percent of right answers of all kinds of models to a task's questions of the most hops."""
    kinds = [kind for kind in NAMES if any(row["kind"] == kind for row in rows)]
    most = list(rows[0]["hops"])[-1]
    text = [f"| {most} hops | {' | '.join(NAMES[kind] for kind in kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    lines_of_kinds = [lines_of([row for row in rows if row["kind"] == kind]) for kind in kinds]
    for shown in lines_of(rows):
        cells = []
        for lines in lines_of_kinds:
            of_way, name = lines.get(shown, ([], ""))
            cells.append(with_error([share(row["hops"][most]["answers"][name]) for row in of_way]))
        text.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(text)


def with_error(values: list[float]) -> str:
    """Mean and standard error over seeds; nothing of no values."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.0f}"
    return f"{mean:.0f} ± {error_of_mean(values):.0f}"


def disagreements(rows: list[dict[str, Any]], one: str, other: str) -> tuple[int, int]:
    """Questions that only one of two ways answered, of all hops above one and all seeds that both have."""
    by_place = {(row["way"], row["seed"]): row for row in rows}
    counts = [0, 0]
    for way, seed in by_place:
        if way != one or (other, seed) not in by_place:
            continue
        for hops in rows[0]["hops"]:
            if hops == "1":
                continue
            answers = [by_place[name, seed]["hops"][hops]["answers"]["as trained"] for name in (one, other)]
            for first, second in zip(*answers, strict=True):
                counts[0] += first > second
                counts[1] += first < second
    return counts[0], counts[1]


DRAWN = [way for way in SHOWN if not way.endswith("_longer")]
COLORS = ("black", *(f"C{number}" for number in range(len(DRAWN) - 1)))
NAMES = {"llama": "Llama", "K1": "K = 1", "K2": "K = 2", "K4": "K = 4"}
CHANCE = {"path": 25, "chain": 100 / 7, "graph": 50}


def draw(rows: list[dict[str, Any]], figure: Path) -> None:
    """Accuracy against hops: a row of panels for each task, a column for each kind of model."""
    tasks = [task for task in CHANCE if any(row["task"] == task for row in rows)]
    drawing = new_figure(2.7 * len(NAMES), 2.3 * len(tasks) + 0.7)
    panels = drawing.subplots(len(tasks), len(NAMES), squeeze=False, sharey=True)
    labels: dict[str, Any] = {}
    for (line, task), (column, kind) in itertools.product(enumerate(tasks), enumerate(NAMES)):
        axes = panels[line][column]
        chosen = [row for row in rows if (row["task"], row["kind"]) == (task, kind)]
        if not chosen:
            axes.set_axis_off()
            continue
        labels |= draw_panel(axes, chosen)
        axes.axhline(CHANCE[task], color="gray", linestyle=":", linewidth=1)
        axes.set(title=f"{task}, {NAMES[kind]}", ylim=(-3, 104))
        if line == len(tasks) - 1:
            axes.set_xlabel("hops")
        if column == 0:
            axes.set_ylabel("right answers, %")
    shown_ways = [shown for shown in SHOWN.values() if shown in labels]
    drawing.legend(
        [labels[one] for one in shown_ways], shown_ways, loc="outside lower center", ncols=4, frameon=False
    )
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure.with_suffix(".png"), dpi=140, facecolor="white")


def draw_panel(axes: Axes, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw one line per way, and return the lines by what their ways are called."""
    lines: dict[str, Any] = {}
    for number, way in enumerate(DRAWN):
        of_way = [row for row in rows if row["way"] == way]
        if not of_way:
            continue
        hops = [int(one) for one in of_way[0]["hops"]]
        shares = [[share(row["hops"][str(one)]["answers"]["as trained"]) for row in of_way] for one in hops]
        means = [statistics.mean(one) for one in shares]
        errors = [error_of_mean(one) for one in shares]
        apart = [one + (number - (len(DRAWN) - 1) / 2) / 40 for one in hops]  # Many lie on each other.
        look: dict[str, Any] = {
            "marker": "osD^v<>PX*"[number],
            "color": COLORS[number],
            "capsize": 2,
            "markersize": 5,
        }
        lines[SHOWN[way]] = axes.errorbar(apart, means, errors, **look)
        axes.set_xticks(hops)
    return lines
