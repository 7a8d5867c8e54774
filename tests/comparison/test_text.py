"""The text that several runs share is prepared once."""

import pytest

from calm.comparison import text as text_module
from calm.comparison.text import with_shared_text
from calm.data.prepared import load_prepared, settings_of
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.training.recipe_files import read_recipe, with_settings


@pytest.fixture
def recipe():
    return with_settings(read_recipe("cpu_tiny"), {"data.vocab_size": 300, "data.num_proc": 1})


def test_recipe_without_sources_uses_the_embedded_stories(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "NUM_STORIES", 20)
    shared = with_shared_text(recipe, tmp_path / "out")
    assert shared.data.sources == [str(tmp_path / "out/data")]
    assert load_prepared(tmp_path / "out/data").vocab_size == 300
    assert settings_of(tmp_path / "out/data")["sources"] == [str(tmp_path / "out/stories.jsonl")]
    (tmp_path / "out/stories.jsonl").unlink()  # The source is not read a second time.
    assert with_shared_text(recipe, tmp_path / "out") == shared


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data.vocab_size", 400),
        ("data.validation_sources", ["b.jsonl"]),
        ("data.validation_fraction", 0.3),
        ("data.text_field", "story"),
        ("seed", 5),
    ],
)
def test_text_prepared_with_other_settings_is_refused(recipe, tmp_path, monkeypatch, setting, value):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write_stories(tmp_path / name, 0, 20)
    recipe = with_settings(recipe, {"data.sources": ["a.jsonl"], "data.validation_fraction": 0.2})
    shared = with_shared_text(recipe, tmp_path / "out")
    assert with_shared_text(with_settings(recipe, {"data.num_proc": 2}), tmp_path / "out").data.sources == (
        shared.data.sources
    )
    with pytest.raises(InputError, match=rf"was prepared with {setting} .*, not .*; choose another --output"):
        with_shared_text(with_settings(recipe, {setting: value}), tmp_path / "out")
    with pytest.raises(InputError, match="was prepared from different sources than the recipe's"):
        with_shared_text(with_settings(recipe, {"data.sources": ["b.jsonl"]}), tmp_path / "out")


def test_streamed_text_is_refused(recipe, tmp_path):
    with pytest.raises(InputError, match=r"set data\.streaming to false"):
        with_shared_text(with_settings(recipe, {"data.streaming": True}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
