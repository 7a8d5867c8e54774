"""The report of one run as a page, for every kind of run."""

import datetime
import html
import math

import pytest
from reports import STRONG, WEAK, Page

from calm.errors import InputError
from calm.evaluation.held_out import Scorecard
from calm.evaluation.perplexity import PerplexityResult
from calm.evaluation.reconstruction import ReconstructionResult
from calm.report.facts import AUTOENCODER, LANGUAGE_MODEL, Provenance, RunFacts, StageFacts
from calm.report.run import RunReport, Sample, read_history, write_report

DATE = datetime.datetime(2026, 7, 9, 14, 5, tzinfo=datetime.timezone.utc)
PROVENANCE = Provenance(DATE, "A processor, 2 cores", {"calm": "1.2", "torch": "3.4"})
STAGES = {
    AUTOENCODER: StageFacts(AUTOENCODER, 1100, 2_252_800, 3.1e12, 300.0),
    LANGUAGE_MODEL: StageFacts(LANGUAGE_MODEL, 680, 2_785_280, 7.5e12, 431.0),
}
HISTORY = {
    AUTOENCODER: [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_token_accuracy": 90.0, "eval_chunk_accuracy": 80.0},
    ],
    LANGUAGE_MODEL: [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_brier_lm": 12.0, "eval_brier_1": 30.0},
    ],
}
NATS = {"step": 2, "eval_cross_entropy": 2.0}
RECONSTRUCTION = ReconstructionResult(0.999, 0.99, 0.95, 0.1)
EXACT = ReconstructionResult(1.0, 1.0, 1.0, 0.0)
LIKELIHOOD = PerplexityResult(math.log(20), 5000)
SAMPLE = Sample("One <day>", " a dog ran.", " a cat slept.")


def calm(**changes):
    """The report of a CALM whose autoencoder was trained before it."""
    values = {
        "title": "A run",
        "card": Scorecard(
            "CALM", STRONG, RECONSTRUCTION, floors={"3-gram": STRONG}, ceilings={"ceiling": STRONG}
        ),
        "history": HISTORY,
        "samples": [SAMPLE],
        "recipe": "seed: 1 # <recipe>",
        "facts": facts(),
    }
    return RunReport(**{**values, **changes})


def facts(model="CALM, K = 4, energy head", stages=(AUTOENCODER, LANGUAGE_MODEL), trained=True, **changes):
    parameters = {"embedding": 1000, "head": 234}
    return RunFacts(model, parameters, [STAGES[stage] for stage in stages], trained, **changes)


def with_codes():
    card = Scorecard("CALM", STRONG, EXACT, LIKELIHOOD, ceilings={"ceiling": STRONG})
    history = {LANGUAGE_MODEL: [*HISTORY[LANGUAGE_MODEL], NATS]}
    name = "CALM, K = 4, sequential head"
    return calm(card=card, history=history, facts=facts(name, [LANGUAGE_MODEL], trained=False))


def autoregressive():
    history = {LANGUAGE_MODEL: [*HISTORY[LANGUAGE_MODEL], NATS]}
    card = Scorecard("autoregressive", STRONG, perplexity=LIKELIHOOD)
    return calm(card=card, history=history, facts=facts("Transformer", [LANGUAGE_MODEL], trained=False))


def with_an_autoencoder_of_another_run():
    return calm(history={LANGUAGE_MODEL: HISTORY[LANGUAGE_MODEL]}, facts=facts(stages=[LANGUAGE_MODEL]))


KINDS = {
    "calm": (calm, 4),
    "codes": (with_codes, 3),
    "autoregressive": (autoregressive, 3),
    "another autoencoder": (with_an_autoencoder_of_another_run, 2),
}


def written_page(tmp_path, report) -> Page:
    write_report(tmp_path / "report.html", report)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def key_figures(page):
    return dict(zip(page.texts("dt"), page.texts("dd", **{"class": "value"}), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_its_report(kind, tmp_path):
    make, num_plots = KINDS[kind]
    report = make()
    page = written_page(tmp_path, report)
    assert page.texts("h1") == page.texts("title") == ["A run"]
    assert page.texts("p", **{"class": "subtitle"}) == [report.facts.model]
    assert page.texts("h2") == ["Held-out text", "Training", "Parameters", "What it writes", "Recipe"]
    assert len(page.texts("picture")) == num_plots
    images = [*page.attributes("img", "src"), *page.attributes("source", "srcset")]
    assert len(set(images)) == 2 * num_plots
    assert all(image.startswith("data:image/svg+xml;base64,") for image in images)
    assert set(page.attributes("source", "media")) == {"screen and (prefers-color-scheme: dark)"}
    assert all(page.attributes("img", "alt"))
    assert report.facts.model in page.texts("th", scope="row")
    figures = key_figures(page)
    assert figures["BrierLM"] == "23.40 ± 0.70" and figures["Parameters"] == "1.23 k"
    assert figures.get("Perplexity") == ("20.00" if report.card.perplexity else None)
    has_reconstruction = report.facts.has_trained_autoencoder
    assert figures.get("Reconstruction") == ("99.90%" if has_reconstruction else None)
    assert ("ceiling" in page.texts("th", scope="row")) == has_reconstruction
    assert ("autoencoder" in page.texts("th", scope="row")) == (len(report.facts.stages) == 2)


def test_header_shows_provenance_and_costs(tmp_path):
    page = written_page(tmp_path, calm(facts=facts(provenance=PROVENANCE)))
    assert page.texts("li") == ["9 July 2026", "A processor, 2 cores", "calm 1.2", "torch 3.4"]
    assert page.attributes("time", "datetime") == ["2026-07-09T14:05:00+00:00"]
    assert key_figures(page) == {
        "BrierLM": "23.40 ± 0.70",
        "Reconstruction": "99.90%",
        "Parameters": "1.23 k",
        "Tokens seen": "2.79 M",
        "Training FLOPs": "10.6 T",
        "Training time": "12 min",
    }
    columns = ["steps", "tokens", "FLOPs", "time"]
    assert [text for text in page.texts("th", scope="col") if text in columns] == columns
    cells = page.texts("td", **{"class": "number"})
    assert "1,100 2.25 M 3.1 T 5 min 680 2.79 M 7.5 T 7 min" in " ".join(cells)
    assert cells[-3:] == ["1,000", "234", "1,234"]


def test_unknown_values_are_left_out(tmp_path):
    stages = [StageFacts(LANGUAGE_MODEL, 680, 2_785_280)]
    report = calm(facts=RunFacts("CALM, K = 4, energy head", {"head": 1}, stages, True))
    page = written_page(tmp_path, report)
    assert not page.texts("time") and not page.texts("li")
    assert not {"Training FLOPs", "Training time"} & set(key_figures(page))
    assert not {"FLOPs", "time"} & set(page.texts("th", scope="col"))
    assert "None" not in (tmp_path / "report.html").read_text() and "nan" not in " ".join(page.texts("td"))


def test_a_run_without_samples_or_logs_has_a_page_without_them(tmp_path):
    page = written_page(tmp_path, calm(samples=[], history={}))
    assert "What it writes" not in page.texts("h2") and not page.texts("picture")
    page = written_page(tmp_path, calm(history={AUTOENCODER: [], LANGUAGE_MODEL: [{"seconds": 2.0}]}))
    assert not page.texts("picture")


def test_samples_and_recipe_are_shown_verbatim(tmp_path):
    page = written_page(tmp_path, calm())
    (article,) = page.texts("article")
    assert article == "One <day> a dog ran. The text itself: … a cat slept."
    assert page.texts("b") == ["One <day>"]
    assert page.texts("details") == ["All settings of this run seed: 1 # <recipe>"]
    assert "open" not in dict(next(attributes for name, attributes, _ in page.elements if name == "details"))


@pytest.mark.parametrize(
    "text", ["</p><script>alert(1)</script>", "{{ 7 * 7 }}", "\ud7ff\u202e\0", "x" * 5000]
)
def test_hostile_texts_are_escaped(text, tmp_path):
    samples = [Sample(text, text, text)]
    write_report(tmp_path / "report.html", calm(title=text, samples=samples, recipe=text))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source and "49" not in Page(source).texts("h1")
    assert source.count(html.escape(text)) >= 5


def test_undefined_brier_lm_is_explained(tmp_path):
    page = written_page(tmp_path, calm(card=Scorecard("CALM", WEAK, RECONSTRUCTION)))
    assert key_figures(page)["BrierLM"] == "undefined"
    assert "Brier-4 below 0; Brier-1 is 12.00" in page.texts("dd", **{"class": "note"})
    assert "undefined: Brier-4 below 0" in page.texts("td")


def test_best_floor_is_shown_with_the_score(tmp_path):
    card = Scorecard("CALM", STRONG, floors={"3-gram": WEAK, "5-gram": STRONG})
    assert "5-gram model: 23.40" in written_page(tmp_path, calm(card=card)).texts("dd", **{"class": "note"})
    page = written_page(tmp_path, calm(card=Scorecard("CALM", STRONG, floors={"3-gram": WEAK})))
    assert not [note for note in page.texts("dd", **{"class": "note"}) if "gram" in note]


def test_best_floor_is_shown_with_the_perplexity(tmp_path):
    floors = {"3-gram": PerplexityResult(math.log(40), 100), "5-gram": PerplexityResult(math.log(30), 100)}
    card = Scorecard(
        "CALM", STRONG, perplexity=PerplexityResult(math.log(20), 100), floor_perplexities=floors
    )
    notes = written_page(tmp_path, calm(card=card)).texts("dd", **{"class": "note"})
    assert "2.996 nats per token; 5-gram model: 30.00" in notes


def test_damaged_history_is_refused(tmp_path):
    (tmp_path / "history.json").write_text("[1]")
    with pytest.raises(InputError, match=r"history\.json' is damaged"):
        read_history(tmp_path / "history.json")
