"""Figures as tables on a terminal."""

import math

import pytest
from rich.console import Console

from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.evaluation.perplexity import PerplexityResult
from calm.evaluation.reconstruction import ReconstructionResult
from calm.flops import Cost, CostOfThoughts
from calm.quantities import duration, short
from calm.report.tables import (
    narrow_table,
    print_costs,
    print_narrow,
    print_scorecard,
    rows_of,
    spaced,
    with_error,
)

GOOD = BrierResult((0.5, 0.3, 0.2, 0.1), 1234, 64, (0.01,) * 4, 0.7)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (2.91e8, "291 M"),
        (1.5e9, "1.5 G"),
        (7.7e20, "770 E"),
        (2e15, "2 P"),
        (7.7e25, "7.7e+07 E"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (119.4, "119 s"), (121, "2 min"), (725, "12 min"), (7170, "2 h 0 min"),
        (12_000, "3 h 20 min"), (200_000, "55 h 33 min"),
    ],
)  # fmt: skip
def test_duration_has_a_suitable_unit(seconds, text):
    assert duration(seconds) == text


def test_spaces_around_plus_minus():
    assert spaced("-1.20±0.10") == "-1.20 ± 0.10" and spaced("undefined") == "undefined"


def test_number_has_its_error_if_known():
    assert with_error(12.347, 0.678) == "12.35 ± 0.68"
    assert with_error(1.0, math.nan) == "1.00"
    assert with_error(1.0, math.nan, sign="+") == "+1.00"


def test_narrow_table_truncates_no_word():
    table = narrow_table(["", "a column"], [["name", "undefined: Brier-4"], ["another", "1"]])
    console = Console(width=24)
    with console.capture() as captured:
        console.print(table)
    words = captured.get().split()
    assert {"undefined:", "Brier-4", "another", "column"} <= set(words) and "…" not in captured.get()


def test_table_too_wide_for_the_terminal_loses_nothing():
    console = Console(width=20)
    with console.capture() as captured:
        print_narrow(console, ["", "a_long_column", "another_one"], [["name", "1", "the_last_cell"]])
    assert {"a_long_column", "another_one", "the_last_cell"} <= set(captured.get().split())


def test_floors_come_before_the_model_and_ceilings_after_it():
    card = Scorecard("CALM", GOOD, floors={"5-gram": GOOD}, ceilings={"exact": GOOD})
    assert [name for name, _ in rows_of(card)] == ["5-gram", "CALM", "exact"]


def test_scorecard_shows_only_what_was_measured(capsys):
    print_scorecard(Scorecard("CALM", GOOD))
    out = capsys.readouterr().out
    assert "1,234 held-out chunks, blocks of 64 tokens, layout documents" in out and "23.40±0.70" in out
    assert "reconstruction" not in out and "perplexity" not in out
    print_scorecard(
        Scorecard(
            "CALM",
            GOOD,
            reconstruction=ReconstructionResult(0.999, 0.99, 0.95, 0.1),
            perplexity=PerplexityResult(math.log(20), 5000),
            floor_perplexities={"3-gram": PerplexityResult(math.log(50), 5000)},
        )
    )
    out = capsys.readouterr().out
    assert "99.900% of tokens, 99.000% of chunks" in out
    text = " ".join(out.split())
    assert "perplexity 20.000 (2.9957 nats per token, 5,000 tokens); 3-gram model: 50.000" in text


def test_costs_are_shown_by_part_with_their_sum(capsys):
    inference = {"head": 1e6, "backbone": 2e6}
    one_draw = Cost(parameters={"head": 10, "backbone": 20}, training={"head": 3.0}, inference=inference)
    many_draws = Cost(parameters={}, training={}, inference={"head": 5e6, "backbone": 2e6})
    print_costs("a model", one_draw, many_draws, 7.0)
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert cells["head"] == ["10", "3", "1 M", "5 M"] and cells["backbone"] == ["20", "", "2 M", "2 M"]
    assert cells["all"] == ["30", "3", "3 M", "7 M"]
    print_costs("a model", one_draw, None, 1.0)
    out = capsys.readouterr().out
    assert "draws" not in out and "thought" not in out


def test_cost_of_thoughts_is_below_the_table(capsys):
    print_costs("a model", Cost(), None, 1.0, CostOfThoughts(1200, 2.5e8, 3.01e11))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "a thought takes 250 M; 1,200 thoughts and 2 markers add 301 G to an answer"
