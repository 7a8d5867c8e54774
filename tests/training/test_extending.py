"""More steps for a run: exact if the learning rates stay the same, with a warning if they do not."""

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy import failure, interrupt, toy_recipe

from calm.cli import main
from calm.data.stories import write_stories
from calm.training import extending, runs, stages
from calm.training.checkpoints import checkpoints_in, step_of
from calm.training.recipe import OptimizerSettings, Recipe
from calm.training.recipe_files import read_recipe, with_settings

STEPS = "language_model.training.steps"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    write_stories(path, 0, 12)
    return path


def recipe_of(text: Path, steps: int, **schedule) -> Recipe:
    recipe = with_settings(toy_recipe(text), {STEPS: steps})
    settings = {f"language_model.training.optimizer.{name}": value for name, value in schedule.items()}
    return with_settings(recipe, settings)


def have_equal_weights(first: Path, second: Path) -> bool:
    weights, others = (load_file(folder / "model.safetensors") for folder in (first, second))
    return weights.keys() == others.keys() and all((weights[name] == others[name]).all() for name in weights)


EXACT = {
    "constant": {"schedule": "constant"},
    "decay": {"schedule": "warmup_stable_decay", "decay_fraction": 0.5},
    "no warm-up": {"schedule": "warmup_stable_decay", "warmup_steps": 0, "decay_fraction": 0.25},
}


@pytest.mark.parametrize("schedule", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("stopped_at", [None, 6], ids=["finished", "stopped"])
def test_extended_run_equals_a_longer_run(text, tmp_path, monkeypatch, schedule, stopped_at):
    longer = stages.train(recipe_of(text, 13, **schedule), tmp_path / "longer")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if stopped_at is not None:
            interrupt(patch, "language_model", stopped_at)
            with pytest.raises(KeyboardInterrupt):
                stages.train(recipe_of(text, 8, **schedule), run)
        else:
            stages.train(recipe_of(text, 8, **schedule), run)
    extended = stages.train(recipe_of(text, 13, **schedule), run, resume=True)
    assert have_equal_weights(longer, extended)
    assert read_recipe(str(run / "recipe.yaml")).language_model.training.steps == 13
    if stopped_at is None:
        short = stages.train(recipe_of(text, 8, **schedule), tmp_path / "short")
        assert have_equal_weights(run / "model-8", short)
    assert stages.train(recipe_of(text, 13, **schedule), run, resume=True) == extended


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_extending_a_decaying_schedule_warns(text, tmp_path, caplog, schedule):
    run = tmp_path / "run"
    stages.train(recipe_of(text, 8, schedule=schedule), run)
    with caplog.at_level("WARNING", logger="calm"):
        stages.train(recipe_of(text, 12, schedule=schedule), run, resume=True)
    assert "continuing from step 8 on a schedule of 12 steps" in caplog.text
    log = json.loads((run / "history.json").read_text())["language_model"]
    assert max(entry["step"] for entry in log) == 12
    newest = checkpoints_in(run / "checkpoints/language_model")[-1]
    state = json.loads((newest / "trainer_state.json").read_text())
    assert state["max_steps"] == 12


def test_decaying_schedule_is_extended_from_the_last_checkpoint(text, tmp_path, caplog):
    """Not from one of the warm-up, although the rates up to there would be those of the longer run."""
    run = tmp_path / "run"
    schedule = {"schedule": "cosine", "warmup_steps": 2}
    saving = {"language_model.training.save_every": 2, "language_model.training.keep_checkpoints": 9}
    stages.train(with_settings(recipe_of(text, 8, **schedule), saving), run)
    with caplog.at_level("INFO", logger="calm"):
        stages.train(with_settings(recipe_of(text, 12, **schedule), saving), run, resume=True)
    assert "continuing from step 8 on a schedule of 12 steps" in caplog.text
    steps = [step_of(checkpoint) for checkpoint in checkpoints_in(run / "checkpoints/language_model")]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_extending_a_run_that_ended_in_its_warm_up_warns(text, tmp_path, caplog):
    run = tmp_path / "run"
    stages.train(recipe_of(text, 4, schedule="constant", warmup_steps=6), run)
    with caplog.at_level("WARNING", logger="calm"):
        stages.train(recipe_of(text, 8, schedule="constant", warmup_steps=6), run, resume=True)
    assert "continuing from step 4 on a schedule of 8 steps" in caplog.text


@pytest.mark.parametrize("killed_in", ["extend_run", "write_recipe"])
def test_a_kill_while_a_run_is_extended_loses_nothing(text, tmp_path, monkeypatch, killed_in):
    schedule = EXACT["decay"]
    run, short = tmp_path / "run", recipe_of(text, 8, **schedule)
    stages.train(short, run)
    with monkeypatch.context() as patch:
        if killed_in == "write_recipe":  # After everything was moved.
            patch.setattr(runs, "write_recipe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(extending, "remove_checkpoints", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe_of(text, 13, **schedule), run, resume=True)
    again = stages.train(short, run, resume=True)  # It can be resumed as it was,
    assert have_equal_weights(again, run / "model-8")
    extended = stages.train(recipe_of(text, 13, **schedule), run, resume=True)  # or extended after all.
    assert have_equal_weights(extended, stages.train(recipe_of(text, 13, **schedule), tmp_path / "longer"))
    assert have_equal_weights(run / "model-8", run / "model-8-2")


def test_only_more_steps_of_the_last_stage_extend_a_run(text, tmp_path, capsys):
    run = tmp_path / "run"
    stages.train(recipe_of(text, 8), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resume = ["train", "--resume", "--output", run]
    error = failure(capsys, *resume, f"--{STEPS}", 7)
    assert "has 8 steps, and the number can only be raised" in error
    assert "differs in autoencoder.training.steps" in failure(
        capsys, *resume, "--autoencoder.training.steps", 50
    )
    error = failure(capsys, *resume, f"--{STEPS}", 9, "--seed", 1)
    assert f"differs in seed, {STEPS}" in error or f"differs in {STEPS}, seed" in error
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main([*map(str, resume), f"--{STEPS}", "9"])
    assert (run / "model").is_dir() and (run / "model-8").is_dir()


def test_the_checkpoint_where_the_decay_begins_is_kept(text, tmp_path):
    run = tmp_path / "run"
    optimizer = OptimizerSettings(
        name="adamw", warmup_steps=2, schedule="warmup_stable_decay", decay_fraction=0.75
    )
    recipe = toy_recipe(text)
    training = dataclasses.replace(
        recipe.language_model.training, steps=12, save_every=2, keep_checkpoints=2, optimizer=optimizer
    )
    language_model = dataclasses.replace(recipe.language_model, training=training)
    stages.train(dataclasses.replace(recipe, language_model=language_model), run)
    names = [checkpoint.name for checkpoint in checkpoints_in(run / "checkpoints/language_model")]
    assert names == ["checkpoint-3", "checkpoint-10", "checkpoint-12"]
