"""The text that several runs share is prepared once."""

import pytest

from calm.comparison import text as text_module
from calm.comparison.text import with_shared_text
from calm.data.prepared import load_prepared, sources_of
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.training.recipe_files import read_recipe, with_settings


@pytest.fixture
def recipe():
    return with_settings(read_recipe("cpu_tiny"), {"data.vocab_size": 300, "data.num_proc": 1})


def test_a_recipe_without_sources_takes_the_embedded_stories(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "NUM_STORIES", 20)
    shared = with_shared_text(recipe, tmp_path / "out")
    assert shared.data.sources == [str(tmp_path / "out/data")]
    assert load_prepared(tmp_path / "out/data").vocab_size == 300
    assert sources_of(tmp_path / "out/data") == [str(tmp_path / "out/stories.jsonl")]
    (tmp_path / "out/stories.jsonl").unlink()  # Prepared once: it is not read again.
    assert with_shared_text(recipe, tmp_path / "out") == shared


def test_a_folder_with_the_text_of_other_sources_is_refused(recipe, tmp_path):
    for name in ("a", "b"):
        write_stories(tmp_path / f"{name}.jsonl", 0, 20)
    with_shared_text(with_settings(recipe, {"data.sources": [str(tmp_path / "a.jsonl")]}), tmp_path / "out")
    with pytest.raises(InputError, match="was prepared from different sources than the recipe's"):
        with_shared_text(
            with_settings(recipe, {"data.sources": [str(tmp_path / "b.jsonl")]}), tmp_path / "out"
        )


def test_streamed_text_is_not_shared(recipe, tmp_path):
    with pytest.raises(InputError, match=r"set data\.streaming to false"):
        with_shared_text(with_settings(recipe, {"data.streaming": True}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
