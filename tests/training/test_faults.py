"""What can happen to a run, done to it: it goes on to the same weights, or stops with one sentence."""

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


def in_both(settings):
    return {f"{stage}.training.{name}": value for stage in STAGES for name, value in settings.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A recipe that saves at every step, and its run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs")
    write_stories(folder / "text.jsonl", 0, 12)
    changes = in_both({"steps": 12, "save_every": 1, "log_every": 1, "evaluate_every": 0})
    recipe = with_settings(toy_recipe(folder / "text.jsonl"), changes)
    write_recipe(recipe, folder / "recipe.yaml")
    stages.train(recipe, folder / "whole")
    return folder, recipe


def same_weights(first, second):
    one, other = (load_file(run / "model/model.safetensors") for run in (first, second))
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def train_in_a_process(folder, output, *more, **settings):
    return start("train", "--recipe", folder / "recipe.yaml", "--output", output, *more, **settings)


def wait_for(path, process, seconds=100):
    """Until a file or folder is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and process.is_running(), process.errors[-2000:]
        time.sleep(0.002)


def test_kill_at_any_moment(whole):
    """SIGKILL while a checkpoint is being written, in both stages, and at a later moment of each."""
    folder, recipe = whole
    output = folder / "killed"
    for stage, name in (
        ("autoencoder", ".partial"),
        ("language_model", ".partial"),
        ("language_model", "checkpoint-7"),
    ):
        process = train_in_a_process(folder, output, *(["--resume"] if output.exists() else []))
        wait_for(output / "checkpoints" / stage / name, process)
        process.send(signal.SIGKILL)
        process.wait()
        for checkpoint in (output / "checkpoints").glob("*/checkpoint-*"):
            assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {
                file.name for file in checkpoint.iterdir()
            }
        assert not (output / "model").exists()
    stages.train(recipe, output, resume=True)
    assert same_weights(folder / "whole", output)


def test_sigterm_leaves_a_checkpoint(whole):
    folder, recipe = whole
    slow = with_settings(recipe, {**in_both({"steps": 400, "save_every": 400}), "report_to": "tensorboard"})
    (folder / "slow").mkdir()
    write_recipe(slow, folder / "slow/recipe.yaml")
    output = folder / "ended"
    process = train_in_a_process(folder / "slow", output)
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


def test_sigterm_in_the_last_step_of_a_stage(whole, monkeypatch):
    """It is not passed over; the run goes on to the same weights."""
    folder, recipe = whole
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
    assert same_weights(folder / "whole", output)


def test_a_loss_that_is_not_finite_stops_the_run(whole, monkeypatch, capsys):
    folder, recipe = whole
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
    said = capsys.readouterr().err
    last = output / "checkpoints/language_model/checkpoint-4"
    assert f"calm: error: the loss of step 5 is not finite; --resume continues from '{last}'." in said
    assert sorted(path.name for path in last.parent.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    stages.train(recipe, output, resume=True)
    assert same_weights(folder / "whole", output)


def test_scores_that_are_not_finite_stop_the_run_as_a_loss_does(whole, capsys):
    """Weights may diverge in the step before a held-out evaluation, which then is the first to meet them."""
    folder, recipe = whole
    settings = {
        "language_model.training.optimizer.learning_rate": 1e5,
        "language_model.training.evaluate_every": 1,
    }
    write_recipe(with_settings(recipe, settings), folder / "fast.yaml")
    with pytest.raises(SystemExit) as raised:
        main(["train", "--recipe", str(folder / "fast.yaml"), "--output", str(folder / "fast")])
    assert raised.value.code == 1
    said = capsys.readouterr().err
    assert (
        " is not finite; " in said
        and "A new run with a lower learning rate" in said
        and "Traceback" not in said
    )


def test_weights_that_are_not_finite_are_never_saved():
    model = torch.nn.Linear(2, 2)
    check_weights(model, 1, "")
    with torch.no_grad():
        model.weight[0, 1] = torch.inf
    with pytest.raises(RunError, match="weights are not finite after step 3; nothing is left"):
        check_weights(model, 3, "nothing is left")
    watch = LossWatch(torch.device("cpu"))
    for step, loss in enumerate([1.0, 2.0, torch.inf, torch.nan, 1.0]):
        watch.record(torch.tensor(loss), step)
    with pytest.raises(RunError, match="the loss of step 2 is not finite; all is lost"):
        watch.check("all is lost")


@pytest.mark.parametrize("limit", [20_000, 40_000])
def test_a_full_disk(whole, limit):
    """Files that cannot grow beyond a limit, as on a full disk."""
    folder, recipe = whole
    output = folder / f"full-{limit}"
    done = train_in_a_process(folder, output, file_limit=limit).wait()
    text = done.stdout + done.stderr
    assert done.returncode == 1, text[-3000:]
    sentence = re.search(r"calm: error: '(.*)' could not be written \((.*)\); (.*)\n", text)
    assert sentence and "Traceback" not in text, text[-3000:]
    assert not list(output.rglob(".partial*"))
    stages.train(recipe, output, resume=(output / "recipe.yaml").exists())
    assert same_weights(folder / "whole", output)


def test_a_worker_that_dies(whole, monkeypatch, capsys):
    folder, recipe = whole
    loading = with_settings(recipe, in_both({"num_workers": 1}))
    write_recipe(loading, folder / "loading.yaml")
    original = ChunkTrainer.training_step

    def deadly(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 2:
            for child in subprocess.check_output(["pgrep", "-P", str(os.getpid())], text=True).split():
                os.kill(int(child), signal.SIGKILL)
        return original(self, model, inputs, num_items_in_batch)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkTrainer, "training_step", deadly)
        with pytest.raises(SystemExit) as raised:
            main(["train", "--recipe", str(folder / "loading.yaml"), "--output", str(folder / "orphan")])
    assert raised.value.code == 1
    assert re.search(
        r"error: .*DataLoader worker .*Lower num_workers.*continues from", capsys.readouterr().err
    )
    stages.train(loading, folder / "orphan", resume=True)
    assert same_weights(folder / "whole", folder / "orphan")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_as_it_hands_over_a_batch(whole, tmp_path, monkeypatch, error):
    _, recipe = whole

    def lost(*_):
        raise error

    monkeypatch.setattr(ChunkTrainer, "get_batch_samples", lost)
    loading = with_settings(recipe, in_both({"num_workers": 1}))
    with pytest.raises(RunError, match=r"A DataLoader worker died \(.+\)\. Lower num_workers"):
        stages.train(loading, tmp_path / "with_worker")
    with pytest.raises(type(error)):  # No worker could have died: this is something else.
        stages.train(recipe, tmp_path / "without")


def test_a_damaged_shard_is_named(whole, tmp_path, capsys):
    folder, _ = whole
    data = tmp_path / "data"
    shutil.copytree(folder / "whole/data", data)
    for shard in (data / "train").glob("*.arrow"):
        shard.write_bytes(shard.read_bytes()[:-100])
    again = ["train", "--recipe", str(folder / "recipe.yaml"), "--data.sources", str(data)]
    with pytest.raises(SystemExit) as raised:
        main([*again, "--output", str(tmp_path / "out")])
    assert raised.value.code == 2
    (shard,) = (data / "train").glob("data-*.arrow")
    assert f"is damaged: {shard.relative_to(shard.parents[1])} has" in capsys.readouterr().err
    # Blocks that were kept for a next time are made anew.
    shutil.copy(folder / "whole/data/train" / shard.name, shard)
    main([*again, "--output", str(tmp_path / "out"), "--overwrite"])
    assert same_weights(folder / "whole", tmp_path / "out")
