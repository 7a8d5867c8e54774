"""One process, two, and one that sums gradients of two halves: the same run."""

import json
import shutil

import pytest
import torch
from processes import launch, torchrun
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.testing import assert_close
from toy import toy_recipe

from calm.data.prepared import load_prepared
from calm.data.stories import stories
from calm.errors import InputError
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
    recipe = folder / "recipe.yaml"
    result = torchrun(2, "--recipe", recipe, "--output", folder / "two", "--report_to", "tensorboard")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(folder / "alone", folder / "two")
    assert result.stdout.count("model:") == 1
    assert not list((folder / "two").rglob(".partial"))
    assert len(list((folder / "two").rglob("events.out.*"))) == 2  # Of both stages, from one process.


def test_a_given_autoencoder_and_a_slow_process(alone):
    """No process may pass a barrier that another does not come to."""
    folder, recipe = alone
    given = with_settings(recipe, {"autoencoder.path": str(folder / "alone/autoencoder")})
    write_recipe(given, folder / "given.yaml")
    slow = "import os, time, calm.training.opening as s; load = s.load_prepared; "
    slow += "s.load_prepared = lambda p: (time.sleep(4 * int(os.environ['RANK'])), load(p))[1]; "
    slow += "from calm.cli import main; main()"
    (folder / "slow.py").write_text(slow)
    result = launch(
        2, "--recipe", folder / "given.yaml", "--output", folder / "given", program=folder / "slow.py"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (folder / "given/model/model.safetensors").is_file()


def test_a_sharded_model(alone):
    """Weights, gradients and optimizer state parted: the same run, which others may go on with."""
    folder, recipe = alone
    muon = with_settings(recipe, {"language_model.training.optimizer.name": "muon"})
    stages.train(muon, folder / "muon")
    sharded = with_settings(
        muon, {"language_model.sharded": True, "autoencoder.path": str(folder / "alone/autoencoder")}
    )
    write_recipe(sharded, folder / "sharded.yaml")
    run = folder / "sharded"
    arguments = ("--recipe", folder / "sharded.yaml", "--output", run)
    result = launch(2, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]

    def assert_same():
        assert_close(
            *(losses(folder / name)["language_model"] for name in ("muon", "sharded")), rtol=1e-5, atol=0.0
        )
        weights = load_file(run / "model/model.safetensors")
        for name, weight in load_file(folder / "muon/model/model.safetensors").items():
            assert_close(weights[name], weight, **WEIGHTS)

    assert_same()
    last = run / "checkpoints/language_model/checkpoint-8"
    written = FileSystemReader(last / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
    assert all(len(tensor.chunks) == 2 for tensor in written.values()), "each process writes its part"

    shutil.rmtree(run / "model")
    shutil.rmtree(last)
    with pytest.raises(InputError, match="written by a sharded run; resume with two or more processes"):
        stages.train(sharded, run, resume=True)
    result = launch(4, *arguments, "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same()


def test_a_sharded_model_in_mixed_precision(alone):
    """It computes in bfloat16 where a model that is not sharded does, and nowhere else."""
    folder, recipe = alone
    given = {"autoencoder.path": str(folder / "alone/autoencoder")}
    mixed = with_settings(recipe, {**given, "language_model.training.precision": "bf16"})
    stages.train(mixed, folder / "mixed")
    write_recipe(with_settings(mixed, {"language_model.sharded": True}), folder / "mixed.yaml")
    result = launch(2, "--recipe", folder / "mixed.yaml", "--output", folder / "mixed-sharded")
    assert result.returncode == 0, result.stderr[-3000:]
    of_one, of_two, in_float32 = (
        torch.tensor([loss for _, loss in losses(folder / name)["language_model"]])
        for name in ("mixed", "mixed-sharded", "alone")
    )
    assert_close(of_two, of_one, rtol=1e-5, atol=0.0)
    assert (of_one / in_float32 - 1).abs().max() > 1e-5


def test_what_does_not_go_with_sharding(alone, monkeypatch):
    folder, recipe = alone
    both = {"language_model.sharded": True, "language_model.training.compile": True}
    with pytest.raises(InputError, match="cannot be compiled yet"):
        stages.train(with_settings(recipe, both), folder / "compiled")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"set language_model\.sharded to true"):
        stages.train(recipe, folder / "by-launcher")
    assert not (folder / "by-launcher").exists()


def program(folder, what):
    """A program that is `calm` with something done at the first loss of step 5 of the second process."""
    path = folder / "program.py"
    path.write_text(
        "import os, signal, calm.training.faults as f\nfrom calm.cli import main\nsee = f.LossWatch.record\n"
        "def watched(self, loss, step):\n    if step == 5 and os.environ['RANK'] == '1':\n"
        f"        {what}\n    see(self, loss, step)\n"
        "f.LossWatch.record = watched\nmain()\n"
    )
    return path


def test_one_process_is_asked_to_leave(alone, tmp_path):
    """All leave with it, and the run goes on to the same end."""
    folder, _ = alone
    arguments = ("--recipe", folder / "recipe.yaml", "--output", tmp_path / "run")
    leaving = program(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)")
    result = torchrun(2, *arguments, program=leaving)
    assert result.returncode != 0
    assert result.stderr.count("calm: stopped by SIGTERM after step 5; --resume continues from") == 2
    result = launch(2, *arguments, "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(folder / "alone", tmp_path / "run")


def test_one_process_has_a_loss_that_is_not_finite(alone, tmp_path):
    folder, _ = alone
    arguments = ("--recipe", folder / "recipe.yaml", "--output", tmp_path / "run")
    result = launch(2, *arguments, program=program(tmp_path, "loss = loss * float('nan')"))
    assert result.returncode != 0
    assert result.stderr.count("the loss of step 5 is not finite; --resume continues from") >= 1
    assert "checkpoint-3" in result.stderr


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
