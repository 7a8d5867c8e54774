"""A run that is replaced is there until the new one can begin, and no two processes work on one."""

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


def import_of(folder, *more):
    parts = ("--autoencoder", folder / "autoencoder", "--model", folder / "calm")
    return [str(part) for part in ("import", *parts, *more)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_stories(folder / "text.jsonl", 0, 30)
    write_recipe(toy_recipe(folder / "text.jsonl"), folder / "toy.yaml")
    stages.train(toy_recipe(folder / "text.jsonl"), folder / "run")
    return folder


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    return tmp_path / "run"


def below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "no space"), MemoryError()])
def test_whatever_stops_the_preparation_the_old_run_stays(error, run, whole, monkeypatch):
    before = below(run)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(opening, "prepare", fail)
    with pytest.raises((KeyboardInterrupt, RuntimeError, MemoryError)):
        stages.train(toy_recipe(whole / "text.jsonl"), run, overwrite=True)
    assert below(run) == before


def test_the_old_run_is_put_back_after_a_kill(run, whole, monkeypatch):
    before = below(run)
    if not (child := os.fork()):
        monkeypatch.setattr(opening, "prepare", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        try:
            stages.train(toy_recipe(whole / "text.jsonl"), run, overwrite=True)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (run / ".replaced/model/model.safetensors").is_file()
    with pytest.raises(InputError, match="is not empty"):  # Any command there will do.
        stages.train(toy_recipe(whole / "text.jsonl"), run)
    assert below(run) == before


def test_a_second_process_is_told_of_the_first(run, whole, tmp_path, capsys):
    long = with_settings(toy_recipe(whole / "text.jsonl"), {"language_model.training.steps": 10**6})
    write_recipe(long, tmp_path / "long.yaml")
    arguments = ["train", "--recipe", str(tmp_path / "long.yaml"), "--output", str(tmp_path / "busy")]
    process = start(*arguments)
    try:
        end = time.monotonic() + 100
        while not (tmp_path / "busy/autoencoder").exists():
            assert time.monotonic() < end and process.is_running()
            time.sleep(0.05)
        for more in (["--resume"], ["--overwrite"]):
            told = failure(capsys, *arguments, *more)
            assert (
                f"another process is working on the run '{tmp_path / 'busy'}' (process {process.pid})" in told
            )
        prepared = ["prepare", whole / "text.jsonl", "--overwrite", "--output", tmp_path / "busy/data"]
        assert "another process is working on the run" in failure(capsys, *prepared)
    finally:
        process.send(signal.SIGKILL)
        process.wait()
    with pytest.raises(InputError, match="can only be raised"):  # The lock has ended with its process.
        stages.train(toy_recipe(whole / "text.jsonl"), tmp_path / "busy", resume=True)


def test_what_our_commands_make_may_be_replaced_by_them(run, whole, tmp_path):
    """Every file that a command leaves is known as its own."""
    check_replaceable(run, TRAINED)
    check_replaceable(run / "data", PREPARED)
    check_replaceable(run / "model", MODEL)
    text = with_settings(toy_recipe(whole / "text.jsonl"), {"data.streaming": True})
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
    main(["demo", "--recipe", str(whole / "toy.yaml"), "--output", str(tmp_path / "demo"), "--stories", "30"])
    check_replaceable(tmp_path / "demo", TRAINED)
    imported = import_of(RELEASED, "--out", tmp_path / "new")
    main(imported)
    main([*imported, "--overwrite"])
    prepare([str(whole / "text.jsonl")], tmp_path / "text", vocab_size=300, num_proc=2)
    check_replaceable(tmp_path / "text", PREPARED)


def test_one_kind_is_not_replaced_by_another(run, whole, capsys):
    before = below(run)
    for command in (
        ["prepare", whole / "text.jsonl", "--overwrite", "--output", run],
        ["prepare", whole / "text.jsonl", "--overwrite", "--output", run / "model"],
        ["train", "--recipe", whole / "toy.yaml", "--overwrite", "--output", run / "data"],
        import_of(RELEASED, "--overwrite", "--out", run),
    ):
        assert "cannot be replaced: it " in failure(capsys, *command), command
    assert below(run) == before


def test_what_is_imported_is_spared(tmp_path, capsys):
    shutil.copytree(RELEASED, tmp_path / "released")
    before = below(tmp_path)
    command = import_of(tmp_path / "released", "--overwrite", "--out", tmp_path / "released/calm")
    told = failure(capsys, *command)
    assert "lies in the output folder" in told and below(tmp_path) == before
