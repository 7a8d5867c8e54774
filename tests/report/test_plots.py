"""Plots of a comparison."""

import pytest
from reports import STRONG, WEAK, WEAKER, check_readable, comparison_of, result_of, rising

from calm.report.measured import Checkpoint, TemperaturePoint
from calm.report.panels import figure_of
from calm.report.plots import collision_panels, correlations, cost_panels, cross_entropy_panels, legend_of

BASELINE = {"head": None, "chunk_size": 1}


def axes_of(panels):
    return {panel.title: figure_of([panel], columns=1).axes[0] for panel in panels}


def heights_in(axis):
    return {round(float(y), 6) for line in axis.get_lines() for y in line.get_ydata()}


def temperature_points(number):
    """Temperature points that differ from model to model."""
    return [
        TemperaturePoint(
            t, (0.9 - t / 2,) * 4, (0.8 - t / 2 + number / 100,) * 4, 3.0, 10.0 ** (6 + number) / t
        )
        for t in (1.0, 0.5)
    ]


@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize(
    ("flops", "seconds"), [(1e9, 0.4), (1.7604e12, 95.0), (1.7604e12, 7201.0), (1e21, 4e6)]
)
def test_all_panels_are_readable(number, flops, seconds):
    results = [
        result_of(
            f"run {k}",
            head=("energy", "sequential")[k % 2],
            training_flops=flops * (1 + k / 1000),  # Equal FLOPs, as in a ladder.
            seconds=seconds * (1 + k / 10),
            checkpoints=rising(flops, cross_entropy=2.0 + k / 1e4),
            temperature_points=temperature_points(k / 100),
        )
        for k in range(number)
    ]
    comparison = comparison_of(*results, floors={"3-gram": STRONG, "5-gram": WEAK})
    for panels in (cost_panels(comparison), collision_panels(comparison), cross_entropy_panels(comparison)):
        check_readable(figure_of(panels, columns=min(2, len(panels)), titled=True))
        for panel in panels:
            check_readable(figure_of([panel], columns=1, legend=False))


def test_cost_panels_show_the_costs_of_the_models():
    comparison = comparison_of(result_of(checkpoints=rising()), result_of("baseline", **BASELINE))
    axes = axes_of(cost_panels(comparison))
    assert list(axes) == ["Training FLOPs", "Training time", "Writing at T = 1", "Writing at T = 0.5"]
    assert {axis.get_ylabel() for axis in axes.values()} == {"BrierLM"}
    xs = {title: {line.get_xdata()[0] for line in axis.get_lines()} - {0} for title, axis in axes.items()}
    assert xs["Training time"] == {1.0} and xs["Writing at T = 0.5"] == {2e6}
    assert axes["Training time"].get_xlabel() == "minutes, autoencoder included"
    slow = comparison_of(result_of(seconds=9000.0))
    assert axes_of(cost_panels(slow))["Training time"].get_xlabel() == "hours, autoencoder included"


def test_labels_do_not_claim_to_include_excluded_costs():
    comparison = comparison_of(result_of(), result_of("K8", chunk_size=8, excluded=("its autoencoder",)))
    axes = axes_of(cost_panels(comparison))
    assert axes["Training FLOPs"].get_xlabel() == "FLOPs, what a run trained"
    assert axes["Training time"].get_xlabel() == "minutes, what a run trained"


def test_costs_that_no_model_has_are_left_out():
    without_costs = result_of(training_flops=None, seconds=None)
    assert [panel.title for panel in cost_panels(comparison_of(without_costs))] == [
        "Writing at T = 1",
        "Writing at T = 0.5",
    ]
    panels = cost_panels(comparison_of(without_costs, result_of("K8", chunk_size=8)))
    assert len(panels) == 4
    assert figure_of([panels[0]], columns=1, legend=False).axes[0].get_legend_handles_labels()[1] == [
        "3-gram", "CALM, K = 8",
    ]  # fmt: skip
    assert len(cost_panels(comparison_of(result_of(), temperature=1.0))) == 3


def test_weak_models_are_compared_by_brier_1():
    checkpoints = [Checkpoint(5e11, None, 8.0), Checkpoint(8e11, None, 9.0)]
    comparison = comparison_of(result_of("weaker", WEAKER), result_of("weak", WEAK, checkpoints))
    axis = axes_of(cost_panels(comparison))["Training FLOPs"]
    assert axis.get_ylabel() == "Brier-1 (%)"
    assert {10.0, 12.0, 50.0, 8.0, 9.0} <= heights_in(axis)  # Models, floor, and checkpoints.


def test_strong_models_are_compared_by_brier_lm():
    checkpoints = [Checkpoint(5e11, None, 8.0), Checkpoint(6e11, 12.0, 20.0)]
    axis = axes_of(cost_panels(comparison_of(result_of("one", STRONG, checkpoints))))["Training FLOPs"]
    assert 12.0 in heights_in(axis) and 8.0 not in heights_in(axis)


def test_the_first_temperature_has_an_open_marker():
    axis = axes_of(collision_panels(comparison_of(result_of())))["The next token"]
    line, first = axis.get_lines()
    assert list(line.get_xdata()) == pytest.approx([40, 65]) and list(line.get_ydata()) == pytest.approx(
        [50, 75]
    )
    assert list(first.get_xdata()) == pytest.approx([40]) and first.get_markerfacecolor() == "#ffffff"


def test_correlation_needs_enough_checkpoints_that_differ():
    baseline = result_of("baseline", checkpoints=rising(cross_entropy=3.0), **BASELINE)
    comparison = comparison_of(result_of(checkpoints=rising()), baseline)
    assert correlations(comparison) == ["Transformer: correlation -1.000 over 4 checkpoints."]
    (axis,) = axes_of(cross_entropy_panels(comparison)).values()
    assert axis.get_xlabel() == "cross-entropy (nats per token)"
    few = result_of(checkpoints=rising(cross_entropy=3.0)[:2])
    same = result_of("K8", checkpoints=[Checkpoint(1.0, 5.0, 6.0, float(k)) for k in range(4)])
    assert cross_entropy_panels(comparison_of(few, same)) == [] == correlations(comparison_of(few, same))


def test_legend_of_a_page_matches_its_plots():
    comparison = comparison_of(result_of(), result_of("baseline", **BASELINE), floors={"3-gram": STRONG})
    entries = legend_of(comparison)
    assert [entry.name for entry in entries] == ["CALM, K = 4", "Transformer", "3-gram"]
    assert [entry.mark for entry in entries] == ["●", "■", ""] and entries[2].dashes
    assert [entry.colour for entry in entries] == ["series-0", "series-1", ""]
    axis = axes_of(collision_panels(comparison))["The next token"]
    assert [line.get_marker() for line in axis.get_lines()[::2]] == ["o", "s"]
