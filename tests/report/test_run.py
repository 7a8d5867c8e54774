"""The report of one run is one page."""

import pytest

from calm.errors import InputError
from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.evaluation.reconstruction import ReconstructionResult
from calm.report.run import Sample, read_history, write_report

GOOD = BrierResult((0.5, 0.3, 0.2, 0.1), 100, 64, (0.01,) * 4, 0.7)
HISTORY = {
    "autoencoder": [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_token_accuracy": 90.0, "eval_chunk_accuracy": 80.0},
    ],
    "language_model": [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_brier_lm": 12.0, "eval_brier_1": 30.0},
    ],
}


@pytest.mark.parametrize("stages", [["autoencoder", "language_model"], ["language_model"]])
def test_the_page_shows_figures_texts_and_recipe(stages, tmp_path):
    card = Scorecard("CALM", GOOD, ReconstructionResult(0.999, 0.99, 0.95, 0.1), floors={"3-gram": GOOD})
    samples = [Sample("One <day>", " a dog ran.", " a cat slept.")]
    history = {stage: HISTORY[stage] for stage in stages}
    write_report(tmp_path / "report.html", "A run", card, history, samples, "seed: 1 # <recipe>")
    page = (tmp_path / "report.html").read_text()
    for part in ("99.900% of tokens", "23.40±0.70", "3-gram", "One &lt;day&gt;</b> a dog ran.", "a cat slept",
                 "seed: 1 # &lt;recipe&gt;"):  # fmt: skip
        assert part in page
    assert page.count("data:image/png;base64,") == 1


def test_a_damaged_history_is_one_sentence(tmp_path):
    (tmp_path / "history.json").write_text("[1]")
    with pytest.raises(InputError, match=r"history\.json' is damaged"):
        read_history(tmp_path / "history.json")
