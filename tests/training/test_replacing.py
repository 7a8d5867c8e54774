"""A run that is overwritten stays until the new one can begin, and only one process works on a run."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import start
from toy import failure, toy_recipe

from calm.cli import main
from calm.data.prepare import prepare
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.storage.ours import FINETUNED, MODEL, PREPARED, TRAINED, check_replaceable
from calm.training import opening, stages
from calm.training.finetuning import finetune
from calm.training.finetuning_recipe import ExampleSettings, FinetuningRecipe, LoraSettings
from calm.training.recipe import TrainingSettings
from calm.training.recipe_files import with_settings, write_recipe

RELEASED = Path(__file__).parents[1] / "fixtures/energy_k4"


def import_command(folder, *more):
    parts = ("--autoencoder", folder / "autoencoder", "--model", folder / "calm")
    return [str(part) for part in ("import", *parts, *more)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a text, a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_stories(folder / "text.jsonl", 0, 30)
    write_recipe(toy_recipe(folder / "text.jsonl"), folder / "toy.yaml")
    stages.train(toy_recipe(folder / "text.jsonl"), folder / "run")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def contents_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "no space"), MemoryError()])
def test_old_run_survives_a_failed_preparation(error, run, finished, monkeypatch):
    before = contents_of(run)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(opening, "prepare", fail)
    with pytest.raises((KeyboardInterrupt, RuntimeError, MemoryError)):
        stages.train(toy_recipe(finished / "text.jsonl"), run, overwrite=True)
    assert contents_of(run) == before


def test_old_run_is_restored_after_a_kill(run, finished, monkeypatch):
    before = contents_of(run)
    if not (child := os.fork()):
        monkeypatch.setattr(opening, "prepare", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        try:
            stages.train(toy_recipe(finished / "text.jsonl"), run, overwrite=True)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (run / ".replaced/model/model.safetensors").is_file()
    with pytest.raises(InputError, match="is not empty"):  # Any command on the run restores it.
        stages.train(toy_recipe(finished / "text.jsonl"), run)
    assert contents_of(run) == before


def test_second_process_on_the_same_run_is_refused(run, finished, tmp_path, capsys):
    long = with_settings(toy_recipe(finished / "text.jsonl"), {"language_model.training.steps": 10**6})
    write_recipe(long, tmp_path / "long.yaml")
    arguments = ["train", "--recipe", str(tmp_path / "long.yaml"), "--output", str(tmp_path / "busy")]
    process = start(*arguments)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "busy/autoencoder").exists():
            assert time.monotonic() < deadline and process.is_running()
            time.sleep(0.05)
        for more in (["--resume"], ["--overwrite"]):
            error = failure(capsys, *arguments, *more)
            expected = f"another process is working on the run '{tmp_path / 'busy'}' (process {process.pid})"
            assert expected in error
        prepared = ["prepare", finished / "text.jsonl", "--overwrite", "--output", tmp_path / "busy/data"]
        assert "another process is working on the run" in failure(capsys, *prepared)
    finally:
        process.send(signal.SIGKILL)
        process.wait()
    with pytest.raises(InputError, match="can only be raised"):  # The lock has ended with its process.
        stages.train(toy_recipe(finished / "text.jsonl"), tmp_path / "busy", resume=True)


def test_commands_may_overwrite_what_they_made(run, finished, tmp_path):
    """Every file that a command leaves is recognized as its own."""
    check_replaceable(run, TRAINED)
    check_replaceable(run / "data", PREPARED)
    check_replaceable(run / "model", MODEL)
    text = with_settings(toy_recipe(finished / "text.jsonl"), {"data.streaming": True})
    stages.train(text, tmp_path / "streamed")
    check_replaceable(tmp_path / "streamed", TRAINED)
    lines = [json.dumps({"prompt": f"p{n}", "completion": "c"}) + "\n" for n in range(9)]
    (tmp_path / "examples.jsonl").write_text("".join(lines))
    recipe = FinetuningRecipe(
        model=str(run / "model"),
        examples=ExampleSettings(sources=str(tmp_path / "examples.jsonl"), context=32),
        lora=LoraSettings(rank=2),
        training=TrainingSettings(steps=2, batch_tokens=64),
    )
    finetune(recipe, tmp_path / "tuned")
    check_replaceable(tmp_path / "tuned", FINETUNED)
    main(["share", str(run)])
    check_replaceable(run, TRAINED)
    demo = ("demo", "--recipe", finished / "toy.yaml", "--output", tmp_path / "demo", "--stories", 30)
    main([str(argument) for argument in demo])
    check_replaceable(tmp_path / "demo", TRAINED)
    imported = import_command(RELEASED, "--out", tmp_path / "new")
    main(imported)
    main([*imported, "--overwrite"])
    prepare([str(finished / "text.jsonl")], tmp_path / "text", vocab_size=300, num_proc=2)
    check_replaceable(tmp_path / "text", PREPARED)


def test_commands_do_not_overwrite_folders_of_another_kind(run, finished, capsys):
    before = contents_of(run)
    for command in (
        ["prepare", finished / "text.jsonl", "--overwrite", "--output", run],
        ["prepare", finished / "text.jsonl", "--overwrite", "--output", run / "model"],
        ["train", "--recipe", finished / "toy.yaml", "--overwrite", "--output", run / "data"],
        import_command(RELEASED, "--overwrite", "--out", run),
    ):
        assert "cannot be replaced: it " in failure(capsys, *command), command
    assert contents_of(run) == before


def test_import_does_not_overwrite_its_source(tmp_path, capsys):
    shutil.copytree(RELEASED, tmp_path / "released")
    before = contents_of(tmp_path)
    command = import_command(tmp_path / "released", "--overwrite", "--out", tmp_path / "released/calm")
    error = failure(capsys, *command)
    assert "lies in the output folder" in error and contents_of(tmp_path) == before
