"""A ladder: the same recipe at several chunk sizes."""

import dataclasses

import pytest
from transformers import LlamaConfig

from calm.comparison.ladder import _stretched, at_chunk_size, train_ladder
from calm.errors import InputError
from calm.training.recipe import TrainingSettings
from calm.training.recipe_files import differences, read_recipe, with_settings


@pytest.mark.parametrize(("chunk_size", "latent_size"), [(1, 16), (2, 24), (4, 48), (8, 96)])
def test_latent_size_is_proportional_to_chunk_size(chunk_size, latent_size):
    recipe = read_recipe("demo")  # It has 48 dimensions for chunks of 4.
    rung = at_chunk_size(recipe, chunk_size)
    assert (rung.chunk_size, rung.autoencoder.latent_size) == (chunk_size, latent_size)
    assert set(differences(recipe, rung)) <= {"chunk_size", "autoencoder.latent_size"}


def test_longer_training_has_as_many_evaluations():
    training = TrainingSettings(steps=100, evaluate_every=25)
    assert _stretched(training, 160) == dataclasses.replace(training, steps=160, evaluate_every=40)
    assert _stretched(training, 2).evaluate_every == 1  # 0 would mean never.
    assert _stretched(dataclasses.replace(training, evaluate_every=0), 7).evaluate_every == 0


@pytest.mark.parametrize(
    ("changes", "sizes", "settings", "message"),
    [
        ({}, [], {"baseline": False}, "there is nothing to train"),
        ({"model": "autoregressive", "chunk_size": 1}, [4], {}, "needs a recipe for a CALM"),
        ({"autoencoder.path": "somewhere"}, [4], {}, "that trains its own autoencoder"),
        ({}, [0], {}, "a chunk size must be at least 1 and at most [0-9,]+, got 0"),
        ({}, [4, -4], {}, "a chunk size must be at least 1 and at most [0-9,]+, got -4"),
        ({}, [10**30], {}, "a chunk size must be at least 1 and at most [0-9,]+, got 10000"),
        ({"chunk_size": 0}, [4], {}, "chunk_size must be at least 1"),
        ({}, [3], {}, "multiple of the chunk size 6"),
        ({}, [4], {"budget": 0.0}, "budget must be above 0, got 0"),
        ({}, [4], {"budget": float("nan")}, "budget must be above 0, got nan"),
        ({"data.streaming": True}, [4], {}, "set data.streaming to false"),
    ],
)
def test_mistakes_are_refused_before_training(changes, sizes, settings, message, tmp_path):
    recipe = with_settings(read_recipe("demo"), changes)
    with pytest.raises(InputError, match=message):
        train_ladder(recipe, sizes, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_text_is_prepared_with_the_tokenizer_of_the_teacher(monkeypatch, tmp_path):
    """Otherwise each of the runs would refuse the text after it has been prepared."""
    LlamaConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "teacher")
    recipe = with_settings(
        read_recipe("demo_sequential"), {"language_model.teacher.model": str(tmp_path / "teacher")}
    )
    monkeypatch.setattr(
        "calm.comparison.ladder.with_shared_text", lambda recipe, _: stop_and_tell_tokenizer(recipe)
    )

    def stop_and_tell_tokenizer(recipe):
        raise InputError(f"{recipe.data.tokenizer} it is")

    with pytest.raises(InputError, match="teacher it is"):
        train_ladder(recipe, [2], tmp_path / "out")
