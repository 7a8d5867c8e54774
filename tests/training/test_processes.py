"""One process, two, and one that sums gradients of two halves: the same run."""

import json

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from toy import launch, toy_recipe

from calm.data.prepare import load_prepared
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


def test_a_given_autoencoder_and_a_slow_process(alone):
    """No process may pass a barrier that another does not come to."""
    folder, recipe = alone
    given = with_settings(recipe, {"autoencoder.path": str(folder / "alone/autoencoder")})
    write_recipe(given, folder / "given.yaml")
    slow = "import os, time, calm.training.stages as s; load = s.load_prepared; "
    slow += "s.load_prepared = lambda p: (time.sleep(4 * int(os.environ['RANK'])), load(p))[1]; "
    slow += "from calm.cli import main; main()"
    (folder / "slow.py").write_text(slow)
    result = launch(
        2, "--recipe", folder / "given.yaml", "--output", folder / "given", program=folder / "slow.py"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (folder / "given/model/model.safetensors").is_file()


def test_an_epoch_has_whole_steps(alone):
    """The blocks do not fill the last step of an epoch, and there are several epochs."""
    folder, recipe = alone
    data = load_prepared(folder / "alone/data")
    number = len(data.blocks("train", chunk_size=4, block_size=32, seed=3))
    assert number % 17 and number < 12 * 17
    odd = {f"{stage}.training.{name}": value for stage in ("autoencoder", "language_model")
           for name, value in {"batch_tokens": 17 * 32, "steps": 24}.items()}  # fmt: skip
    stages.train(with_settings(recipe, odd), folder / "odd")
    small = {f"{stage}.training.microbatch_tokens": 32 for stage in ("autoencoder", "language_model")}
    stages.train(with_settings(recipe, odd | small), folder / "odd-parts")
    for stage, figures in losses(folder / "odd").items():
        others = losses(folder / "odd-parts")[stage]
        assert len(figures) == 24
        assert_close([loss for _, loss in figures], [loss for _, loss in others], rtol=1e-3, atol=0.0)


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
