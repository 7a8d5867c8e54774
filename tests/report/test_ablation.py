"""An ablation as Markdown, as JSON, and on a terminal."""

import datetime
import json

import pytest

from calm.report.ablation import print_ablation, write_ablation
from calm.report.facts import Provenance
from calm.report.measured import AblationTable, Outcome

SCORE = {"brier_lm": 12.0, "error": 0.5, "brier_1": 40.0, "brier_2": 20.0, "brier_3": 8.0, "brier_4": 3.0}
DATE = datetime.datetime(2026, 7, 9, tzinfo=datetime.timezone.utc)
PROVENANCE = Provenance(DATE, "A processor, 2 cores", {"torch": "3.4"})


def written_lines(tmp_path, name="one", seconds=None, **changes) -> list[str]:
    outcome = Outcome(name, 1e12, 1_234_567, 4.7, [SCORE | {"token_accuracy": 99.0}] * 2, seconds or [])
    values = {
        "question": "Which?",
        "seeds": [1, 2],
        "context": 64,
        "outcomes": [outcome],
        "recipe": "seed: 1\n",
    }
    write_ablation(AblationTable(**{**values, "provenance": PROVENANCE, **changes}), tmp_path / "ablation.md")
    return (tmp_path / "ablation.md").read_text(encoding="utf-8").splitlines()


def test_file_has_provenance_scores_costs_and_recipe(tmp_path):
    lines = written_lines(tmp_path)
    assert lines[0] == "Which?" and lines[2] == "9 July 2026 · A processor, 2 cores · torch 3.4"
    columns = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    cells = dict(zip(columns, (cell.strip() for cell in lines[6].split("|")[1:-1]), strict=True))
    assert cells[""] == "one" and cells["seed 1"] == "12.00 ± 0.50" and cells["mean"] == "12.00 ± 0.00"
    assert cells["tokens reconstructed"] == "99.00%"
    assert (cells["parameters"], cells["training FLOPs"], cells["in the paper"]) == ("1.23 M", "1 T", "4.70")
    folded = "\n".join(lines[lines.index("<details>") :])
    assert "<summary>" in folded and "```yaml\nseed: 1\n```" in folded and folded.endswith("</details>")


@pytest.mark.parametrize(("seconds", "shown"), [([60.0, 100.0], "80 s"), ([60.0, None], ""), ([], "")])
def test_time_is_the_mean_over_seeds_if_all_are_known(seconds, shown, tmp_path):
    lines = written_lines(tmp_path, seconds=seconds)
    column = [cell.strip() for cell in lines[4].split("|")].index("training time")
    assert lines[6].split("|")[column].strip() == shown


def test_excluded_costs_are_named(tmp_path):
    outcome = Outcome(
        "one", 1e12, 10**6, None, [SCORE | {"token_accuracy": 99.0}] * 2, excluded=("its part",)
    )
    note = next(
        line for line in written_lines(tmp_path, outcomes=[outcome]) if "one column for each seed" in line
    )
    assert note.endswith("The costs of one do not include the training of its part.")


def test_names_are_left_aligned_and_numbers_right_aligned(tmp_path):
    alignments = [cell.strip() for cell in written_lines(tmp_path)[5].split("|")[1:-1]]
    assert alignments == [":---", *["---:"] * (len(alignments) - 1)]


def test_unknown_provenance_is_left_out(tmp_path):
    lines = written_lines(tmp_path, provenance=Provenance())
    assert lines[0] == "Which?" and lines[2].startswith("|")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a | b", "a \\| b"), ("a\nb", "a b"), ("<script>", "&lt;script&gt;"), ("β = ½", "β = ½")],
)
def test_special_characters_do_not_break_the_table(name, shown, tmp_path):
    lines = written_lines(tmp_path, name, question=name)
    assert lines[0] == shown and lines[6].startswith(f"| {shown} | 12.00")


def test_json_has_the_figures_without_provenance(tmp_path):
    """So the same ablation gives the same file at any time."""
    written_lines(tmp_path)
    figures = json.loads((tmp_path / "ablation.json").read_text())
    assert set(figures) == {"question", "seeds", "context", "layout", "outcomes"}
    assert figures["outcomes"][0]["parameters"] == 1_234_567


@pytest.mark.parametrize("first", [SCORE, SCORE | {"brier_lm": 0.0, "brier_4": -0.1}])
def test_printed_table_is_not_truncated(first, capsys):
    scores = [score | {"token_accuracy": 99.0} for score in (first, SCORE)]
    outcome = Outcome("no posterior draws", 1e12, 10**6, 4.7, scores, [700.0, 800.0])
    print_ablation(AblationTable("Which?", [1, 2], 64, [outcome], "seed: 1\n"))
    lines = capsys.readouterr().out.splitlines()
    words = {word for line in lines for word in line.split()}
    assert {"posterior", "reconstructed", "FLOPs", "paper", "4.70"} <= words
    assert ("undefined:" in words) == (first is not SCORE)
