"""What a comparison measures, and on which text."""

import pytest
from toy import toy_recipe

from calm.comparison.ablation import Ablation, Choice, run_ablation
from calm.comparison.costs import blocks_of_run
from calm.comparison.measures import Measures, _open_data, compare
from calm.data.chunking import BlockSettings
from calm.data.prepare import prepare
from calm.data.prepared import load_prepared
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.evaluation.held_out import score_model
from calm.models.loading import load_model_and_tokenizer
from calm.report.ablation import write_ablation
from calm.results import ReportOptions, show_results
from calm.sharing.card import CardDetails
from calm.sharing.trained import card_of_training
from calm.training.recipe_files import read_recipe, with_settings, write_recipe


def test_temperature_1_is_always_measured():
    assert Measures(temperatures=(0.3, 0.7), low=0.5).all_temperatures == [1.0, 0.7, 0.5, 0.3]
    assert Measures(temperatures=(), low=1.0).all_temperatures == [1.0]


@pytest.mark.parametrize("low", [0.0, -0.5, 1.5, float("nan"), 0.004])
def test_a_temperature_out_of_range_is_refused(low):
    with pytest.raises(InputError, match="temperature"):
        Measures(low=low)


def test_runs_need_different_names(tmp_path):
    for runs, names in (([], "none"), ([tmp_path / "a/model", tmp_path / "b/model"], "model, model")):
        with pytest.raises(InputError, match=f"runs with different names, got: {names}"):
            compare(runs, None, Measures())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_stories(folder / "text.jsonl", 0, 20)
    prepare([str(folder / "text.jsonl")], folder / "data", vocab_size=300, num_proc=1)
    return folder / "data"


def test_text_is_given_or_in_the_run_or_named_by_its_recipe(prepared, tmp_path):
    assert _open_data(tmp_path / "nowhere", prepared).vocab_size == 300
    assert _open_data(prepared.parent, None).vocab_size == 300
    recipe = with_settings(read_recipe("demo"), {"data.sources": [str(prepared)]})
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert _open_data(tmp_path, None).vocab_size == 300


def test_run_has_the_same_scores_wherever_they_are_shown(tmp_path):
    """They are for the layout of its recipe; another layout gives other scores."""
    write_stories(tmp_path / "text.jsonl", 0, 20)
    recipe = with_settings(toy_recipe(tmp_path / "text.jsonl"), {"data.layout": "packed"})
    ablation = Ablation(question="Which?", choices=[Choice(name="one", settings={})])
    table = run_ablation(ablation, recipe, [3], tmp_path / "out")
    run = tmp_path / "out/one/seed3"
    card = show_results(run, ReportOptions("one", num_blocks=None, sample_tokens=4))
    data = load_prepared(tmp_path / "out/data")
    model, _ = load_model_and_tokenizer(str(run / "model"))
    packed, documents = (
        score_model(model, data, BlockSettings(32, layout, 3)) for layout in ("packed", "documents")
    )
    assert card.brier == packed.brier != documents.brier and card.layout == "packed"
    brier_1 = 100 * card.brier.means[0]
    assert table.outcomes[0].scores[0]["brier_1"] == brier_1 and table.layout == "packed"
    assert table.outcomes[0].scores[0]["token_accuracy"] == 100 * card.reconstruction.token_accuracy
    write_ablation(table, tmp_path / "table.md")
    assert "blocks of 32 tokens, layout packed, T = 1" in (tmp_path / "table.md").read_text()
    page = card_of_training(run, CardDetails("one"), [], None)
    assert f"| {brier_1:.2f} ±" in page and "blocks of 32 tokens (layout packed)" in page
    few = Measures(context=32, temperatures=(), low=1.0, num_texts=1, text_tokens=4, ngrams=(3,))
    comparison = compare([run], tmp_path / "out/data", few)
    assert comparison.results[0].card.brier == card.brier
    assert comparison.floors["3-gram"].num_chunks == card.brier.num_chunks
    assert "in blocks of 32 tokens, layout packed, " in comparison.protocol
    assert blocks_of_run(tmp_path / "nowhere", 32) == BlockSettings(32, "documents", 0)


def test_run_without_prepared_text_needs_the_data_option(tmp_path):
    write_recipe(with_settings(read_recipe("demo"), {"data.sources": "a.txt"}), tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match="contains no prepared text; pass it with --data"):
        _open_data(tmp_path, None)
