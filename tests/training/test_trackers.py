"""Trackers: off unless asked for, one tracked run per stage, which a resumed stage continues."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import failure, interrupt, toy_recipe
from trackers import Mlflow, Trackio, Wandb, stand_in

from calm.data.stories import write_stories
from calm.errors import InputError, RunError
from calm.training import stages
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.inputs import digest_of_recipe
from calm.training.recipe_files import read_recipe, with_settings, write_recipe
from calm.training.runs import Run
from calm.training.trackers import tracking_of

SERVICES = ["wandb", "mlflow", "trackio"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    write_stories(path, 0, 12)
    return path


@pytest.fixture
def recipe(text):
    """Its language model is evaluated only after training, its autoencoder during training as well."""
    return with_settings(toy_recipe(text), {"language_model.training.evaluate_every": 0})


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins for the services by name, and an environment without settings for them."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    services = {"wandb": Wandb(), "mlflow": Mlflow(), "trackio": Trackio()}
    for name, service in services.items():
        stand_in(monkeypatch, name, service)
    return services


def test_nothing_is_tracked_unless_asked_for(recipe, trackers, tmp_path):
    stages.train(recipe, tmp_path / "run")
    assert not any(service.runs for service in trackers.values())
    assert not [path for path in tmp_path.rglob("*") if path.name in ("tensorboard", "trackers.json")]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_resumed_stage_continues_its_tracked_run(recipe, trackers, tmp_path, monkeypatch):
    recipe = with_settings(recipe, {"report_to": SERVICES})
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 5)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, tmp_path / "mine")
    stages.train(recipe, tmp_path / "mine", resume=True)
    for name, service in trackers.items():
        first, second = service.runs.values()
        ids = [json.loads(file.read_text())["id"] for file in sorted(tmp_path.rglob("trackers.json"))]
        assert [first.name, second.name] == [f"mine/autoencoder-{ids[0]}", f"mine/language_model-{ids[1]}"]
        prefix = "eval_" if name == "mlflow" else "eval/"
        assert first.steps(f"{prefix}token_accuracy") == [3, 6, 8]
        assert second.steps(f"{prefix}brier_1") == [8]  # After training, and in the same run.
        assert first.steps("loss" if name == "mlflow" else "train/loss")[0] == 1
        if name == "mlflow":
            assert second.settings["recipe.language_model.training.steps"] == 8
        else:
            assert second.settings["recipe"]["language_model"]["training"]["steps"] == 8
        assert first.begun == 1 and second.begun >= 2
    wandb, mlflow, _ = (list(trackers[name].runs.values()) for name in SERVICES)
    assert [run.ends for run in wandb] == [[0], [1, 0]]
    assert [run.ends for run in mlflow] == [["FINISHED"], ["FAILED", "FINISHED"]]
    assert trackers["trackio"].context_vars.current_run.get() is None
    assert trackers["mlflow"].experiment == os.environ["WANDB_PROJECT"] == "calm"


def test_tensorboard_has_the_recipe_and_the_metrics(recipe, tmp_path):
    recipe = with_settings(recipe, {"report_to": "tensorboard"})
    stages.train(recipe, tmp_path / "run")
    expected = {"autoencoder": ("eval/token_accuracy", [3, 6, 8]), "language_model": ("eval/brier_1", [8])}
    for stage, (metric, steps) in expected.items():
        events = EventAccumulator(str(tmp_path / "run/checkpoints" / stage / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars(metric)] == steps
        (arguments,) = events.Tensors("args/text_summary")
        logged = json.loads(arguments.tensor_proto.string_val[0])
        assert logged["recipe"]["language_model"]["training"]["steps"] == 8


def test_environment_settings_of_a_tracker_are_kept(recipe, trackers, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    stages.train_autoencoder(with_settings(recipe, {"report_to": SERVICES}), tmp_path / "run")
    assert trackers["mlflow"].experiment == "theirs" and os.environ["WANDB_INIT_TIMEOUT"] == "3"


def test_a_run_of_the_caller_is_used_and_left_open(recipe, trackers, tmp_path):
    wandb, mlflow = trackers["wandb"], trackers["mlflow"]
    wandb.init("theirs", "1", "allow")
    mlflow.start_run(run_name="theirs", tags={"calm.id": "1"})
    stages.train_autoencoder(with_settings(recipe, {"report_to": ["wandb", "mlflow"]}), tmp_path / "run")
    for service in (wandb, mlflow):
        (run,) = service.runs.values()
        assert run.name == "theirs" and run.logged and not run.ends


def test_tracker_that_cannot_start_stops_the_run(recipe, trackers, tmp_path, monkeypatch):
    recipe = with_settings(recipe, {"report_to": ["mlflow", "wandb"]})
    monkeypatch.setattr(trackers["wandb"], "fault", RuntimeError("there is no key\n(see elsewhere)"))
    message = "wandb cannot start a run (there is no key); --resume continues once it can, or without it"
    with pytest.raises(RunError, match=re.escape(message)):
        stages.train(recipe, tmp_path / "run")
    (started,) = trackers["mlflow"].runs.values()
    assert started.ends == ["FAILED"]
    stages.train(with_settings(recipe, {"report_to": []}), tmp_path / "run", resume=True)
    assert read_recipe(str(tmp_path / "run/recipe.yaml")).report_to == []
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_tracker_that_cannot_finish_does_not_stop_the_run(recipe, trackers, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers["mlflow"], "end_fault", RuntimeError("the server is gone"))
    stages.train(with_settings(recipe, {"report_to": "mlflow"}), tmp_path / "run")
    assert caplog.text.count("mlflow could not finish its run (the server is gone).") == 2
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_a_tracker_that_is_named_twice_has_one_run(recipe, trackers, tmp_path):
    recipe = with_settings(recipe, {"report_to": ["wandb", "wandb"]})
    stages.train_autoencoder(recipe, tmp_path / "run")
    (run,) = trackers["wandb"].runs.values()
    assert run.ends == [0] and run.steps("eval/token_accuracy") == [3, 6, 8]


def test_trackers_do_not_change_the_digest_of_a_recipe(recipe):
    assert digest_of_recipe(with_settings(recipe, {"report_to": "wandb"})) == digest_of_recipe(recipe)


def test_invalid_trackers_are_refused_before_anything_is_written(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(recipe, Path("recipe.yaml"))
    command = ["train", "--recipe", "recipe.yaml", "--output", "run", "--report_to"]
    known = "report_to takes tensorboard, wandb, mlflow, trackio, or [] for none; got "
    assert f"{known}'tensorbord'" in failure(capsys, *command, "tensorbord")
    assert f"{known}'all'" in failure(capsys, *command, "[tensorboard,all]")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert "needs mlflow, which is not installed: pip install mlflow" in failure(capsys, *command, "mlflow")
    finetuning = ["finetune", "--model", "stories", "--examples.sources", "none", "--output", "run"]
    assert f"{known}'all'" in failure(capsys, *finetuning, "--report_to", "all")
    assert sorted(path.name for path in Path().iterdir()) == ["recipe.yaml"]


def test_damaged_tracker_file_starts_new_runs(tmp_path):
    run = Run(FinetuningRecipe(report_to="wandb"), tmp_path / "qa")
    (tmp_path / "qa/checkpoints").mkdir(parents=True)
    file = tmp_path / "qa/checkpoints/trackers.json"
    file.write_text('{"id": "0123abcd"}')
    assert tracking_of(run).run_name == "qa-0123abcd"
    for damaged in ('{"id": ', "[]", "{}"):
        file.write_text(damaged)
        assert tracking_of(run).run_name not in ("qa-0123abcd", "qa-")


def test_overwriting_a_run_replaces_its_tracker_file(recipe, tmp_path):
    recipe = with_settings(recipe, {"report_to": "tensorboard"})
    stages.train_autoencoder(recipe, tmp_path / "run")
    before = (tmp_path / "run/checkpoints/autoencoder/trackers.json").read_text()
    stages.train(recipe, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run/checkpoints/autoencoder/trackers.json").read_text() != before
    with pytest.raises(InputError, match="is not empty"):
        stages.train(recipe, tmp_path / "run")
