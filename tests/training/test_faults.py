"""Faults that can befall a run: it resumes to the same weights, or stops with one sentence."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from processes import start
from safetensors.torch import load_file
from toy import toy_recipe

from calm.cli import main
from calm.data.stories import write_stories
from calm.errors import RunError, Terminated
from calm.training import stages
from calm.training.faults import LossWatch, check_weights
from calm.training.recipe_files import with_settings, write_recipe
from calm.training.trainer import ChunkTrainer

STAGES = ("autoencoder", "language_model")


def in_both_stages(settings):
    return {f"{stage}.training.{name}": value for stage in STAGES for name, value in settings.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with a recipe that saves at every step and its undisturbed run, and the recipe."""
    folder = tmp_path_factory.mktemp("runs")
    write_stories(folder / "text.jsonl", 0, 12)
    changes = in_both_stages({"steps": 12, "save_every": 1, "log_every": 1, "evaluate_every": 0})
    recipe = with_settings(toy_recipe(folder / "text.jsonl"), changes)
    write_recipe(recipe, folder / "recipe.yaml")
    stages.train(recipe, folder / "uninterrupted")
    return folder, recipe


def have_equal_weights(first, second):
    weights, others = (load_file(run / "model/model.safetensors") for run in (first, second))
    return weights.keys() == others.keys() and all((weights[name] == others[name]).all() for name in weights)


def start_training(folder, output, *more, **settings):
    return start("train", "--recipe", folder / "recipe.yaml", "--output", output, *more, **settings)


def wait_for(path, process, seconds=100):
    """Wait until a file or folder exists."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline and process.is_running(), process.errors[-2000:]
        time.sleep(0.002)


def test_killed_run_resumes_to_the_same_weights(uninterrupted):
    """SIGKILL while a checkpoint is being written, in both stages, and at a later moment of each."""
    folder, recipe = uninterrupted
    output = folder / "killed"
    for stage, name in (
        ("autoencoder", ".partial"),
        ("language_model", ".partial"),
        ("language_model", "checkpoint-7"),
    ):
        process = start_training(folder, output, *(["--resume"] if output.exists() else []))
        wait_for(output / "checkpoints" / stage / name, process)
        process.send(signal.SIGKILL)
        process.wait()
        for checkpoint in (output / "checkpoints").glob("*/checkpoint-*"):
            assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {
                file.name for file in checkpoint.iterdir()
            }
        assert not (output / "model").exists()
    stages.train(recipe, output, resume=True)
    assert have_equal_weights(folder / "uninterrupted", output)


def test_sigterm_leaves_a_checkpoint(uninterrupted):
    folder, recipe = uninterrupted
    slow = with_settings(
        recipe, {**in_both_stages({"steps": 400, "save_every": 400}), "report_to": "tensorboard"}
    )
    (folder / "slow").mkdir()
    write_recipe(slow, folder / "slow/recipe.yaml")
    output = folder / "ended"
    process = start_training(folder / "slow", output)
    wait_for(output / "checkpoints/autoencoder/tensorboard", process)
    time.sleep(0.3)
    process.send(signal.SIGTERM)
    done = process.wait(100)
    text = done.stdout + done.stderr
    assert done.returncode == 128 + signal.SIGTERM, text[-2000:]
    (checkpoint,) = (output / "checkpoints/autoencoder").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 1 <= step < 400
    assert f"calm: stopped by SIGTERM after step {step}; --resume continues from '{checkpoint}'." in text
    assert "Traceback" not in text


def test_sigterm_in_the_last_step_of_a_stage_still_stops_the_run(uninterrupted, monkeypatch):
    """And the run resumes to the same weights."""
    folder, recipe = uninterrupted
    output = folder / "ended-late"
    original = ChunkTrainer.training_step

    def signalled(self, model, inputs, num_items_in_batch=None):
        if self.args.output_dir.endswith("autoencoder") and self.state.global_step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, inputs, num_items_in_batch)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkTrainer, "training_step", signalled)
        with pytest.raises(Terminated, match="after step 12; --resume continues from"):
            stages.train(recipe, output)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    stages.train(recipe, output, resume=True)
    assert have_equal_weights(folder / "uninterrupted", output)


def test_a_loss_that_is_not_finite_stops_the_run(uninterrupted, monkeypatch, capsys):
    folder, recipe = uninterrupted
    output = folder / "diverged"
    original = ChunkTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        is_bad = self.args.output_dir.endswith("language_model") and self.state.global_step == 4
        return original(self, *args, **kwargs) * (torch.nan if is_bad else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkTrainer, "compute_loss", poisoned)
        with pytest.raises(SystemExit) as raised:
            main(["train", "--recipe", str(folder / "recipe.yaml"), "--output", str(output)])
    assert raised.value.code == 1
    stderr = capsys.readouterr().err
    last = output / "checkpoints/language_model/checkpoint-4"
    assert f"calm: error: the loss of step 5 is not finite; --resume continues from '{last}'." in stderr
    assert sorted(path.name for path in last.parent.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    stages.train(recipe, output, resume=True)
    assert have_equal_weights(folder / "uninterrupted", output)


def test_scores_that_are_not_finite_stop_the_run_as_well(uninterrupted, capsys):
    """Weights may diverge just before a held-out evaluation, which then is the first to notice."""
    folder, recipe = uninterrupted
    settings = {
        "language_model.training.optimizer.learning_rate": 1e5,
        "language_model.training.evaluate_every": 1,
    }
    write_recipe(with_settings(recipe, settings), folder / "fast.yaml")
    with pytest.raises(SystemExit) as raised:
        main(["train", "--recipe", str(folder / "fast.yaml"), "--output", str(folder / "fast")])
    assert raised.value.code == 1
    stderr = capsys.readouterr().err
    assert " is not finite; " in stderr and "A new run with a lower learning rate" in stderr
    assert "Traceback" not in stderr


def test_weights_that_are_not_finite_are_an_error():
    model = torch.nn.Linear(2, 2)
    check_weights(model, 1, "")
    with torch.no_grad():
        model.weight[0, 1] = torch.inf
    with pytest.raises(RunError, match="weights are not finite after step 3; nothing is left"):
        check_weights(model, 3, "nothing is left")


def test_the_first_step_with_a_loss_that_is_not_finite_is_named():
    watch = LossWatch(torch.device("cpu"))
    for step, loss in enumerate([1.0, 2.0, torch.inf, torch.nan, 1.0]):
        watch.record(torch.tensor(loss), step)
    with pytest.raises(RunError, match="the loss of step 2 is not finite; all is lost"):
        watch.check("all is lost")


@pytest.mark.parametrize("limit", [20_000, 40_000])
def test_full_disk_is_reported_and_the_run_resumes(uninterrupted, limit):
    """Files cannot grow beyond a limit, as on a full disk."""
    folder, recipe = uninterrupted
    output = folder / f"full-{limit}"
    done = start_training(folder, output, file_limit=limit).wait()
    text = done.stdout + done.stderr
    assert done.returncode == 1, text[-3000:]
    sentence = re.search(r"calm: error: '(.*)' could not be written \((.*)\); (.*)\n", text)
    assert sentence and "Traceback" not in text, text[-3000:]
    assert not list(output.rglob(".partial*"))
    stages.train(recipe, output, resume=(output / "recipe.yaml").exists())
    assert have_equal_weights(folder / "uninterrupted", output)


def test_dead_dataloader_worker_is_reported_and_the_run_resumes(uninterrupted, monkeypatch, capsys):
    folder, recipe = uninterrupted
    loading = with_settings(recipe, in_both_stages({"num_workers": 1}))
    write_recipe(loading, folder / "loading.yaml")
    original = ChunkTrainer.training_step

    def kill_workers(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 2:
            for child in subprocess.check_output(["pgrep", "-P", str(os.getpid())], text=True).split():
                os.kill(int(child), signal.SIGKILL)
        return original(self, model, inputs, num_items_in_batch)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkTrainer, "training_step", kill_workers)
        with pytest.raises(SystemExit) as raised:
            main(["train", "--recipe", str(folder / "loading.yaml"), "--output", str(folder / "orphan")])
    assert raised.value.code == 1
    assert re.search(
        r"error: .*DataLoader worker .*Lower num_workers.*continues from", capsys.readouterr().err
    )
    stages.train(loading, folder / "orphan", resume=True)
    assert have_equal_weights(folder / "uninterrupted", folder / "orphan")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_dataloader_worker_that_dies_in_a_transfer_is_reported(uninterrupted, tmp_path, monkeypatch, error):
    _, recipe = uninterrupted

    def fail(*_):
        raise error

    monkeypatch.setattr(ChunkTrainer, "get_batch_samples", fail)
    loading = with_settings(recipe, in_both_stages({"num_workers": 1}))
    with pytest.raises(RunError, match=r"A DataLoader worker died \(.+\)\. Lower num_workers"):
        stages.train(loading, tmp_path / "with_worker")
    with pytest.raises(type(error)):  # Without workers, the cause must be another.
        stages.train(recipe, tmp_path / "without")


def test_damaged_shard_is_named_and_can_be_restored(uninterrupted, tmp_path, capsys):
    folder, _ = uninterrupted
    data = tmp_path / "data"
    shutil.copytree(folder / "uninterrupted/data", data)
    for shard in (data / "train").glob("*.arrow"):
        shard.write_bytes(shard.read_bytes()[:-100])
    command = ["train", "--recipe", str(folder / "recipe.yaml"), "--data.sources", str(data)]
    with pytest.raises(SystemExit) as raised:
        main([*command, "--output", str(tmp_path / "out")])
    assert raised.value.code == 2
    (shard,) = (data / "train").glob("data-*.arrow")
    assert f"is damaged: {shard.relative_to(shard.parents[1])} has" in capsys.readouterr().err
    # Blocks that were cached from the damaged text are not used.
    shutil.copy(folder / "uninterrupted/data/train" / shard.name, shard)
    main([*command, "--output", str(tmp_path / "out"), "--overwrite"])
    assert have_equal_weights(folder / "uninterrupted", tmp_path / "out")
