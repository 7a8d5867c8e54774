"""Plots of one run."""

import pytest
from reports import STRONG, WEAK, check_readable

from calm.evaluation.held_out import Scorecard
from calm.evaluation.perplexity import PerplexityResult
from calm.report.curves import panels_of_run
from calm.report.facts import AUTOENCODER, LANGUAGE_MODEL
from calm.report.panels import figure_of

FLOORS = {"3-gram": STRONG, "5-gram": WEAK}


def history(steps=1000, last=7.0):
    every = max(1, steps // 50)
    autoencoder = [{"step": step, "loss": 30.0 / step} for step in range(1, steps + 1, every)]
    language_model = [{"step": step, "loss": 9.0 - 12 * step / steps} for step in range(1, steps + 1, every)]
    reconstruction = {"eval_token_accuracy": 99.9991, "eval_chunk_accuracy": 99.9989}
    autoencoder += [
        {"step": steps // 2, **reconstruction},
        {"step": steps, **reconstruction},
        {"train_runtime": 3.0},
    ]
    language_model += [
        {"step": steps // 2, "eval_brier_lm": 0.0, "eval_brier_1": 9.0, "eval_cross_entropy": 3.0},
        {"step": steps, "eval_brier_lm": last, "eval_brier_1": 12.0, "eval_cross_entropy": 2.9},
    ]
    return {AUTOENCODER: autoencoder, LANGUAGE_MODEL: language_model}


def axis_of(panels, word):
    (panel,) = [panel for panel in panels if word in panel.title]
    return figure_of([panel], columns=1).axes[0]


@pytest.mark.parametrize("steps", [1, 2, 680, 99_999, 1_000_000])
@pytest.mark.parametrize("perplexity", [None, PerplexityResult(2.0, 100)])
def test_all_panels_are_readable(steps, perplexity):
    panels = panels_of_run(history(steps), Scorecard("CALM", STRONG, perplexity=perplexity, floors=FLOORS))
    assert len(panels) == 5
    for panel in panels:
        figure = figure_of([panel], columns=1)
        check_readable(figure)
        assert figure.axes[0].get_xlabel() == "step" and figure.axes[0].get_ylabel()


def test_losses_have_their_units():
    likelihood = PerplexityResult(2.0, 100)
    for perplexity, in_nats, unit in (
        (None, True, "loss of the head"),
        (likelihood, True, "loss (nats per token)"),
        (likelihood, False, "loss of the head"),  # Such as minus a Brier score.
    ):
        panels = panels_of_run(history(), Scorecard("CALM", STRONG, perplexity=perplexity), in_nats)
        assert axis_of(panels, "Language model: training").get_ylabel() == unit
        assert axis_of(panels, "Autoencoder: training").get_ylabel() == "loss (nats per chunk)"


@pytest.mark.parametrize("last", [0.0, 7.0])
def test_curve_is_of_brier_1_if_brier_lm_is_undefined(last):
    card = Scorecard("CALM", STRONG if last else WEAK, floors=FLOORS)
    axis = axis_of(panels_of_run(history(last=last), card), "BrierLM" if last else "Brier-1")
    *floors, line = axis.get_lines()
    assert list(line.get_ydata()) == ([7.0] if last else [9.0, 12.0])
    heights = [23.403] if last else [50.0, 12.0]  # A floor whose BrierLM is undefined is left out.
    assert [floor.get_ydata()[0] for floor in floors] == pytest.approx(heights, abs=0.01)


def test_no_panel_for_what_was_not_logged():
    card = Scorecard("CALM", STRONG, floors=FLOORS)
    assert panels_of_run({}, card) == []
    assert panels_of_run({AUTOENCODER: [], LANGUAGE_MODEL: [{"train_runtime": 1.0}]}, card) == []
    logged = {LANGUAGE_MODEL: [{"step": 1, "loss": 2.0}]}
    assert [panel.title for panel in panels_of_run(logged, card)] == ["Language model: training loss"]


def test_a_few_points_are_dots_and_many_a_line():
    card = Scorecard("CALM", STRONG)
    (few,) = axis_of(panels_of_run(history(2), card), "Language model: training").get_lines()
    (many,) = axis_of(panels_of_run(history(), card), "Language model: training").get_lines()
    assert few.get_marker() == "o" and many.get_marker() == "None"
