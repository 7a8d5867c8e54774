"""Where BrierLM is undefined, tables say why, and plots and orders go by Brier-1."""

import math

import pytest

from calm.core.brier import brier_lm, undefined_brier_lm
from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.report.ablation import write_ablation
from calm.report.comparison import _best, print_comparison, write_comparison
from calm.report.measured import AblationTable, Checkpoint, Comparison, ModelResult, Outcome, TemperaturePoint
from calm.report.plots import plot_costs
from calm.report.run import _plot
from calm.report.tables import cells_of
from calm.training.progress import _shown

STRONG = BrierResult((0.5, 0.3, 0.2, 0.1), 100, 64, (0.01,) * 4, 0.7)
WEAK = BrierResult((0.12, 0.01, 0.002, -0.001), 100, 64, (0.01,) * 4)
WEAKER = BrierResult((0.1, 0.01, -0.004, 0.001), 100, 64, (0.01,) * 4)


@pytest.mark.parametrize(
    ("means", "reason"),
    [
        ((0.1, 0.1, 0.1, 0.1, -0.1), None),
        ((0.1, 0.1, 0.1, -0.1), "Brier-4 below 0"),
        ((0.1, -0.2, 0.1, -0.1), "Brier-2 below 0"),
        ((0.1, 0.1, 0.0, 0.1), "Brier-3 is 0"),
        ((0.1, 0.1, math.nan, 0.1), "Brier-3 is not known"),
    ],
)
def test_the_reason_names_the_lowest_order(means, reason):
    assert undefined_brier_lm(means) == reason
    assert (brier_lm(means) > 0) == (reason is None)


def test_cells_say_why():
    orders = ["12.00±1.00", "1.00±1.00", "0.20±1.00", "-0.10±1.00"]
    assert cells_of(WEAK) == ["undefined: Brier-4 below 0", *orders]
    assert cells_of(STRONG)[0] == "23.40±0.70"


def result(name, result, checkpoints=()):
    temperature_points = [TemperaturePoint(t, (0.5,) * 4, (0.2,) * 4, 3.0, 1e6) for t in (1.0, 0.5)]
    card = Scorecard(name=name, brier=result, floors={}, ceilings={}, reconstruction=None, perplexity=None)
    return ModelResult(name, 4, 10**6, card, 1e12, 60.0, list(checkpoints), temperature_points, ["text"])


def comparison(*results):
    return Comparison(list(results), {"3-gram": STRONG}, 0.5, ["prompt"], "protocol")


def test_a_comparison_of_weak_models_goes_by_brier_1(tmp_path, capsys):
    passed = [Checkpoint(5e11, None, 8.0), Checkpoint(8e11, None, 9.0)]
    weak = comparison(result("weaker", WEAKER), result("weak", WEAK, passed))
    assert _best(weak).name == "weak"
    print_comparison(weak)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("undefined:") == 2 and " 0.00" not in printed and "…" not in printed
    write_comparison(weak, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "undefined: Brier-4 below 0" in page and "undefined: Brier-3 below 0" in page
    axis = plot_costs(weak).axes[0]
    assert "Brier-1" in axis.get_ylabel()
    heights = {round(float(y), 6) for line in axis.get_lines() for y in line.get_ydata()}
    assert {10.0, 12.0, 50.0, 8.0, 9.0} <= heights  # Models, floor, and checkpoints.


def test_a_comparison_of_strong_models_goes_by_brier_lm():
    strong = comparison(result("one", STRONG, [Checkpoint(5e11, None, 8.0), Checkpoint(6e11, 12.0, 20.0)]))
    axis = plot_costs(strong).axes[0]
    assert axis.get_ylabel().startswith("BrierLM")
    assert 12.0 in {float(y) for line in axis.get_lines() for y in line.get_ydata()}


def test_an_ablation_tells_how_many_seeds_have_none(tmp_path):
    scores = [
        {"brier_lm": 12.0, "error": 0.5, "brier_1": 40.0, "brier_2": 20.0, "brier_3": 8.0, "brier_4": 3.0},
        {"brier_lm": 0.0, "error": math.nan, "brier_1": 9.0, "brier_2": 1.0, "brier_3": 0.1, "brier_4": -0.1},
    ]
    outcome = Outcome("one", 1e12, None, [score | {"token_accuracy": 0.99} for score in scores])
    write_ablation(AblationTable("Which?", [1, 2], 64, [outcome]), tmp_path / "ablation.md")
    row = (tmp_path / "ablation.md").read_text().splitlines()[4]
    assert "| 12.00 ± 0.50 | undefined: Brier-4 below 0 | undefined for 1 of 2 | 24.50 |" in row


@pytest.mark.parametrize("last", [0.0, 7.0])
def test_the_curve_of_a_run_is_what_is_defined(last):
    entries = [{"step": 3, "eval_brier_lm": 0.0, "eval_brier_1": 9.0}]
    entries.append({"step": 6, "eval_brier_lm": last, "eval_brier_1": 12.0})
    history = {"language_model": [{"step": 1, "loss": 3.0}, *entries]}
    card = result("one", STRONG if last else WEAK).card
    axis = _plot(history, card).axes[1]
    assert list(axis.get_lines()[0].get_ydata()) == ([7.0] if last else [9.0, 12.0])
    assert ("undefined" in axis.get_title()) == (not last)


def test_training_says_why():
    figures = {"brier_lm": 0.0, "brier_1": 9.0, "brier_2": 1.0, "brier_3": -0.1, "brier_4": 0.2}
    assert _shown("brier_lm", 0.0, figures) == "undefined (Brier-3 below 0)"
    assert _shown("brier_lm", 12.3456, figures) == "12.35"
