"""One process, two, and one that sums gradients of two halves: the same run."""

import json

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from toy import launch, toy_recipe

from calm.data.stories import stories
from calm.training import stages
from calm.training.recipe_files import with_settings, write_recipe

# Sums in another order: rounding, which training amplifies step by step.
LOSSES = {"rtol": 1e-5, "atol": 0.0}
WEIGHTS = {"rtol": 0.0, "atol": 1e-4}


def losses(run):
    history = json.loads((run / "history.json").read_text())
    return {
        stage: [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        for stage, entries in history.items()
    }


def assert_same_run(first, second):
    for stage, figures in losses(first).items():
        others = losses(second)[stage]
        assert len(figures) >= 8
        assert [step for step, _ in figures] == [step for step, _ in others]
        assert_close([loss for _, loss in figures], [loss for _, loss in others], **LOSSES)
    for folder in ("autoencoder", "model"):
        one, other = (load_file(run / folder / "model.safetensors") for run in (first, second))
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name], **WEIGHTS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A recipe whose runs are compared, and its run on one process."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "stories.jsonl"
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(0, 12)))
    recipe = with_settings(
        toy_recipe(text, "adamw"),
        {
            f"{stage}.training.{name}": value
            for stage in ("autoencoder", "language_model")
            for name, value in {"batch_tokens": 128, "log_every": 1, "optimizer.learning_rate": 3e-3}.items()
        },
    )
    write_recipe(recipe, folder / "recipe.yaml")
    stages.train(recipe, folder / "alone")
    return folder, recipe


def test_summed_gradients(alone):
    folder, recipe = alone
    halves = with_settings(
        recipe,
        {f"{stage}.training.microbatch_tokens": 64 for stage in ("autoencoder", "language_model")},
    )
    stages.train(halves, folder / "halves")
    assert_same_run(folder / "alone", folder / "halves")


def test_two_processes(alone):
    folder, _ = alone
    result = launch(2, "--recipe", folder / "recipe.yaml", "--output", folder / "two")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(folder / "alone", folder / "two")
    assert result.stdout.count("model:") == 1
    assert not list((folder / "two").rglob(".partial"))


def test_a_step_that_cannot_be_shared(alone):
    folder, _ = alone
    result = launch(3, "--recipe", folder / "recipe.yaml", "--output", folder / "three")
    assert result.returncode != 0
    assert "multiple of 96 (blocks of 32 tokens x 3 processes), got 128" in result.stderr
    assert (
        'Traceback (most recent call last):\n  File "<frozen runpy>'
        not in result.stderr.split("calm: error")[0]
    )
    assert not (folder / "three").exists()
