"""Models side by side: which is the best, how far the others are from it, and the page that shows them."""

import datetime
import json
import math
from unittest.mock import Mock

import pytest
import torch
from reports import STRONG, Page, comparison_of, result_of, rising

from calm.core.brier import DocumentSums, brier_lm_difference
from calm.evaluation.brier import BrierResult
from calm.evaluation.held_out import Scorecard
from calm.evaluation.perplexity import PerplexityResult
from calm.report.comparison import _best, _difference, print_comparison, write_comparison
from calm.report.facts import Provenance


def test_the_difference_to_the_best_model():
    scores, document = torch.rand(80, 4, generator=torch.Generator().manual_seed(0)), torch.arange(80) // 4

    def brier_of(scores_PK, documents_P):
        sums = DocumentSums.of_positions(scores_PK, documents_P)
        return BrierResult(tuple(sums.means_X.tolist()), len(scores_PK), 64, documents=sums)

    first, better = brier_of(scores, document), brier_of(scores * 1.1, document)
    difference, error = brier_lm_difference(better.documents, first.documents)
    assert difference == pytest.approx(0.1 * first.brier_lm) and 0 < error < 0.2 * difference
    assert _difference(better, first) == f"+{difference:.2f}±{error:.2f}"
    assert _difference(first, first) == ""
    other = brier_of(scores[:-4] * 1.2, document[:-4])  # Better still, but on fewer windows than the others.
    assert _difference(other, first) == ""
    results = [Mock(card=Mock(brier=brier)) for brier in (first, other, better)]
    assert _best(Mock(results=results)) is results[2]


BASELINE = {"head": None, "chunk_size": 1}
PROVENANCE = Provenance(
    datetime.datetime(2026, 7, 9, tzinfo=datetime.timezone.utc), "A processor, 2 cores", {"torch": "3.4"}
)


def written_page(tmp_path, *results, **changes) -> Page:
    write_comparison(comparison_of(*results, **changes), tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_models_have_display_names_beside_the_names_of_their_runs(tmp_path):
    perplexity = PerplexityResult(math.log(20), 5000)
    baseline = result_of(
        "baseline", **BASELINE, card=Scorecard("autoregressive", STRONG, perplexity=perplexity)
    )
    page = written_page(tmp_path, result_of("K4"), result_of("K8", chunk_size=8), baseline)
    names = ["CALM, K = 4", "CALM, K = 8", "Transformer"]
    assert page.texts("th", scope="row") == ["3-gram", *names, *names]
    assert page.texts("dt") == [*names, *names] and [
        t for t in page.texts("td") if t in ("K4", "K8", "baseline")
    ]
    assert page.texts("dd", **{"class": "value"}) == ["23.40 ± 0.70"] * 3
    assert "perplexity" in page.texts("th", scope="col") and "20.00" in page.texts("td")
    assert "reconstruction" not in page.texts("th", scope="col")  # None has an autoencoder.


def test_page_and_json_have_date_hardware_and_software(tmp_path):
    page = written_page(tmp_path, result_of(), provenance=PROVENANCE)
    assert page.texts("li")[:3] == ["9 July 2026", "A processor, 2 cores", "torch 3.4"]
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["provenance"] == {
        "date": "2026-07-09T00:00:00+00:00", "hardware": "A processor, 2 cores", "software": {"torch": "3.4"},
    }  # fmt: skip
    written_page(tmp_path, result_of())
    assert json.loads((tmp_path / "report.json").read_text())["provenance"]["date"] is None


def test_known_recipes_are_collapsed(tmp_path):
    page = written_page(tmp_path, result_of(recipe="seed: 1 # <b>"), result_of("mere", chunk_size=8))
    assert page.texts("details") == ["CALM, K = 4 seed: 1 # <b>"]
    assert "Recipes" not in written_page(tmp_path, result_of()).texts("h2")
    assert "recipe" not in (tmp_path / "report.json").read_text()


def test_plots_are_on_the_page_and_in_png_files(tmp_path):
    baseline = result_of("baseline", checkpoints=rising(cross_entropy=3.0), **BASELINE)
    page = written_page(tmp_path, result_of(), baseline)
    assert len(page.texts("picture")) == 4 + 2 + 1
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "report_collision.png", "report_cost.png", "report_cross_entropy.png",
    ]  # fmt: skip
    entries = page.texts("ul", **{"class": "legend"})
    assert entries == ["● CALM, K = 4 ■ Transformer 3-gram"] * 3
    assert "Transformer: correlation -1.000 over 4 checkpoints." in page.texts("p")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$x^{2$", "_hidden", "a\nb", "{{ 7 * 7 }}"])
def test_hostile_names_and_texts_are_escaped(name, tmp_path):
    twins = [result_of(name, texts=[name]), result_of(f"{name}2", texts=["</dd>"])]
    page = written_page(tmp_path, *twins, prompts=[name], protocol=name)
    assert not page.texts("script")
    shown = " ".join(f"CALM, K = 4 ({name})".split())
    assert shown in page.texts("dt") and f"… {' '.join(name.split())}" in page.texts("dd")


def test_texts_are_grouped_by_prompt(tmp_path):
    results = [result_of(texts=["a1", "a2"]), result_of("baseline", texts=["b1", "b2"], **BASELINE)]
    page = written_page(tmp_path, *results, prompts=["one", "two"])
    assert page.texts("h3") == ["one …", "two …"]
    texts = "CALM, K = 4 … {0}1 Transformer … {1}1"
    assert page.texts("dl", **{"class": "side-by-side"}) == [
        texts.format("a", "b"), texts.format("a", "b").replace("1", "2"),
    ]  # fmt: skip
    assert "Texts at T = 0.5" not in written_page(tmp_path, result_of(texts=[]), prompts=[]).texts("h2")


def test_excluded_costs_are_named(tmp_path, capsys):
    parts = ("the model that it started from", "its autoencoder")
    begun = result_of("begun", chunk_size=8, excluded=parts)
    words = "do not include the training of the model that it started from and of its autoencoder."
    note = f"The costs of CALM, K = 8 {words}"
    page = written_page(tmp_path, result_of(), begun)
    assert sum(note in text for text in page.texts("p")) == 2  # Under the costs, and under the plots.
    print_comparison(comparison_of(result_of(), begun))
    out = " ".join(capsys.readouterr().out.split())
    assert f"The costs of begun {words}" in out and out.count("do not include") == 1


def test_terminal_shows_names_of_runs_within_80_columns(capsys):
    print_comparison(comparison_of(result_of("K4"), result_of("my_run")))
    out = capsys.readouterr().out
    assert "my_run" in out and "1 M" in out and "60 s" in out and max(map(len, out.splitlines())) <= 80
