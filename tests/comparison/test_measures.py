"""What is measured of models side by side, and on which text."""

import pytest

from calm.comparison.measures import Measures, _open_data, compare
from calm.data.prepare import prepare
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.training.recipe_files import read_recipe, with_settings, write_recipe


def test_one_is_always_among_the_temperatures():
    assert Measures(temperatures=(0.3, 0.7), low=0.5).all_temperatures == [1.0, 0.7, 0.5, 0.3]
    assert Measures(temperatures=(), low=1.0).all_temperatures == [1.0]


@pytest.mark.parametrize("low", [0.0, -0.5, 1.5, float("nan"), 0.004])
def test_a_temperature_out_of_range_is_refused(low):
    with pytest.raises(InputError, match="temperature"):
        Measures(low=low)


def test_runs_need_names_that_differ(tmp_path):
    for runs, names in (([], "none"), ([tmp_path / "a/model", tmp_path / "b/model"], "model, model")):
        with pytest.raises(InputError, match=f"runs with different names, got: {names}"):
            compare(runs, None, Measures())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_stories(folder / "text.jsonl", 0, 20)
    prepare([str(folder / "text.jsonl")], folder / "data", vocab_size=300, num_proc=1)
    return folder / "data"


def test_the_text_is_what_is_named_or_in_the_run_or_what_the_run_was_trained_on(prepared, tmp_path):
    assert _open_data(tmp_path / "nowhere", prepared).vocab_size == 300
    assert _open_data(prepared.parent, None).vocab_size == 300
    recipe = with_settings(read_recipe("demo"), {"data.sources": [str(prepared)]})
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert _open_data(tmp_path, None).vocab_size == 300


def test_a_run_whose_text_is_not_prepared_needs_one_named(tmp_path):
    write_recipe(with_settings(read_recipe("demo"), {"data.sources": "a.txt"}), tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match="contains no prepared text; pass it with --data"):
        _open_data(tmp_path, None)
