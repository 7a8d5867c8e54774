"""Where BrierLM is undefined, tables say why, and models are ranked by Brier-1."""

import math

import pytest
from reports import STRONG, WEAK, WEAKER, Page, comparison_of, result_of

from calm.core.brier import brier_lm, undefined_brier_lm
from calm.report.ablation import write_ablation
from calm.report.comparison import _best, print_comparison, write_comparison
from calm.report.measured import AblationTable, Outcome
from calm.report.tables import cells_of
from calm.training.progress import _formatted


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


def test_cell_says_why_brier_lm_is_undefined():
    orders = ["12.00±1.00", "1.00±1.00", "0.20±1.00", "-0.10±1.00"]
    assert cells_of(WEAK) == ["undefined: Brier-4 below 0", *orders]
    assert cells_of(STRONG)[0] == "23.40±0.70"


def test_comparison_of_weak_models_says_why(tmp_path, capsys):
    weak = comparison_of(result_of("weaker", WEAKER, chunk_size=8), result_of("weak", WEAK))
    assert _best(weak).name == "weak"
    print_comparison(weak)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("undefined:") == 2 and " 0.00" not in printed and "…" not in printed
    write_comparison(weak, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {"undefined: Brier-4 below 0", "undefined: Brier-3 below 0"} <= set(page.texts("td"))
    assert page.texts("dd", **{"class": "value"}) == ["undefined", "undefined"]
    assert any("Brier-1 (BrierLM is undefined for some)" in text for text in page.texts("p"))


def test_ablation_counts_seeds_whose_brier_lm_is_undefined(tmp_path):
    scores = [
        {"brier_lm": 12.0, "error": 0.5, "brier_1": 40.0, "brier_2": 20.0, "brier_3": 8.0, "brier_4": 3.0},
        {"brier_lm": 0.0, "error": math.nan, "brier_1": 9.0, "brier_2": 1.0, "brier_3": 0.1, "brier_4": -0.1},
    ]
    outcome = Outcome("one", 1e12, 10**6, None, [score | {"token_accuracy": 99.0} for score in scores])
    write_ablation(AblationTable("Which?", [1, 2], 64, [outcome], "seed: 1\n"), tmp_path / "ablation.md")
    row = (tmp_path / "ablation.md").read_text().splitlines()[4]
    assert "| 12.00 ± 0.50 | undefined: Brier-4 below 0 | undefined for 1 of 2 | 24.50 |" in row


def test_training_log_says_why():
    figures = {"brier_lm": 0.0, "brier_1": 9.0, "brier_2": 1.0, "brier_3": -0.1, "brier_4": 0.2}
    assert _formatted("brier_lm", figures) == "undefined (Brier-3 below 0)"
    assert _formatted("brier_lm", figures | {"brier_lm": 12.3456}) == "12.35"
