"""One process, several processes and gradient accumulation give the same run."""

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

# Sums in another order differ by rounding, which training amplifies step by step.
LOSS_TOLERANCE = {"rtol": 1e-5, "atol": 0.0}
WEIGHT_TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def losses_of(run):
    history = json.loads((run / "history.json").read_text())
    return {
        stage: [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        for stage, entries in history.items()
    }


def assert_same_run(first, second):
    for stage, figures in losses_of(first).items():
        others = losses_of(second)[stage]
        assert len(figures) >= 8
        assert [step for step, _ in figures] == [step for step, _ in others]
        assert_close([loss for _, loss in figures], [loss for _, loss in others], **LOSS_TOLERANCE)
    for folder in ("autoencoder", "model"):
        weights, other_weights = (load_file(run / folder / "model.safetensors") for run in (first, second))
        assert weights.keys() == other_weights.keys()
        for name in weights:
            assert_close(weights[name], other_weights[name], **WEIGHT_TOLERANCE)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A folder with a recipe and its run on one process, and the recipe."""
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


def test_gradient_accumulation_gives_the_same_run(one_process):
    folder, recipe = one_process
    halves = with_settings(
        recipe,
        {f"{stage}.training.microbatch_tokens": 64 for stage in ("autoencoder", "language_model")},
    )
    stages.train(halves, folder / "halves")
    assert_same_run(folder / "alone", folder / "halves")


def test_two_processes_give_the_same_run(one_process):
    folder, _ = one_process
    recipe = folder / "recipe.yaml"
    result = torchrun(2, "--recipe", recipe, "--output", folder / "two", "--report_to", "tensorboard")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(folder / "alone", folder / "two")
    assert result.stdout.count("model:") == 1
    assert not list((folder / "two").rglob(".partial"))
    assert len(list((folder / "two").rglob("events.out.*"))) == 2  # One per stage, from one process.


def test_slow_process_is_waited_for_with_a_given_autoencoder(one_process):
    """No process may wait at a barrier that another never reaches."""
    folder, recipe = one_process
    given = with_settings(recipe, {"autoencoder.path": str(folder / "alone/autoencoder")})
    write_recipe(given, folder / "given.yaml")
    slow = "import os, time, calm.training.opening as s; load = s.load_prepared; "
    slow += "s.load_prepared = lambda *a, **k: (time.sleep(4 * int(os.environ['RANK'])), load(*a, **k))[1]; "
    slow += "from calm.cli import main; main()"
    (folder / "slow.py").write_text(slow)
    result = launch(
        2, "--recipe", folder / "given.yaml", "--output", folder / "given", program=folder / "slow.py"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (folder / "given/model/model.safetensors").is_file()


def test_sharded_training_gives_the_same_run(one_process):
    """With weights, gradients and optimizer state sharded; other numbers of processes can resume it."""
    folder, recipe = one_process
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
            *(losses_of(folder / name)["language_model"] for name in ("muon", "sharded")), rtol=1e-5, atol=0.0
        )
        weights = load_file(run / "model/model.safetensors")
        for name, weight in load_file(folder / "muon/model/model.safetensors").items():
            assert_close(weights[name], weight, **WEIGHT_TOLERANCE)

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


def test_sharded_mixed_precision_has_the_same_losses(one_process):
    """It computes in bfloat16 exactly where an unsharded model does."""
    folder, recipe = one_process
    given = {"autoencoder.path": str(folder / "alone/autoencoder")}
    mixed = with_settings(recipe, {**given, "language_model.training.precision": "bf16"})
    stages.train(mixed, folder / "mixed")
    write_recipe(with_settings(mixed, {"language_model.sharded": True}), folder / "mixed.yaml")
    result = launch(2, "--recipe", folder / "mixed.yaml", "--output", folder / "mixed-sharded")
    assert result.returncode == 0, result.stderr[-3000:]
    unsharded, sharded, in_float32 = (
        torch.tensor([loss for _, loss in losses_of(folder / name)["language_model"]])
        for name in ("mixed", "mixed-sharded", "alone")
    )
    assert_close(sharded, unsharded, rtol=1e-5, atol=0.0)
    assert (unsharded / in_float32 - 1).abs().max() > 1e-5


def test_sharding_refuses_compilation_and_fsdp_of_the_launcher(one_process, monkeypatch):
    folder, recipe = one_process
    settings = {"language_model.sharded": True, "language_model.training.compile": True}
    with pytest.raises(InputError, match="cannot be compiled yet"):
        stages.train(with_settings(recipe, settings), folder / "compiled")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"set language_model\.sharded to true"):
        stages.train(recipe, folder / "by-launcher")
    assert not (folder / "by-launcher").exists()


def program_with_fault(folder, statement):
    """A program that is `calm`, with a statement that runs at step 5 in the second process."""
    program = folder / "program.py"
    program.write_text(
        "import os, signal, calm.training.faults as f\nfrom calm.cli import main\nsee = f.LossWatch.record\n"
        "def watched(self, loss, step):\n    if step == 5 and os.environ['RANK'] == '1':\n"
        f"        {statement}\n    see(self, loss, step)\n"
        "f.LossWatch.record = watched\nmain()\n"
    )
    return program


def test_sigterm_to_one_process_stops_all_of_them(one_process, tmp_path):
    """And the run resumes to the same end."""
    folder, _ = one_process
    arguments = ("--recipe", folder / "recipe.yaml", "--output", tmp_path / "run")
    leaving = program_with_fault(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)")
    result = torchrun(2, *arguments, program=leaving)
    assert result.returncode != 0
    assert result.stderr.count("calm: stopped by SIGTERM after step 5; --resume continues from") == 2
    result = launch(2, *arguments, "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(folder / "alone", tmp_path / "run")


def test_loss_that_is_not_finite_in_one_process_stops_the_run(one_process, tmp_path):
    folder, _ = one_process
    arguments = ("--recipe", folder / "recipe.yaml", "--output", tmp_path / "run")
    result = launch(2, *arguments, program=program_with_fault(tmp_path, "loss = loss * float('nan')"))
    assert result.returncode != 0
    assert result.stderr.count("the loss of step 5 is not finite; --resume continues from") >= 1
    assert "checkpoint-3" in result.stderr


def test_incomplete_steps_at_the_end_of_an_epoch_are_left_out(one_process):
    """With microbatches as well: over several epochs, the losses are the same."""
    folder, recipe = one_process
    data = load_prepared(folder / "alone/data")
    number = len(data.blocks("train", chunk_size=4, block_size=32, seed=3))
    assert number % 17 and number < 12 * 17
    odd = {f"{stage}.training.{name}": value for stage in ("autoencoder", "language_model")
           for name, value in {"batch_tokens": 17 * 32, "steps": 24}.items()}  # fmt: skip
    stages.train(with_settings(recipe, odd), folder / "odd")
    small = {f"{stage}.training.microbatch_tokens": 32 for stage in ("autoencoder", "language_model")}
    stages.train(with_settings(recipe, odd | small), folder / "odd-parts")
    for stage, figures in losses_of(folder / "odd").items():
        others = losses_of(folder / "odd-parts")[stage]
        assert len(figures) == 24
        assert_close([loss for _, loss in figures], [loss for _, loss in others], rtol=1e-3, atol=0.0)


def test_batch_that_the_processes_cannot_share_is_refused(one_process):
    folder, _ = one_process
    result = launch(3, "--recipe", folder / "recipe.yaml", "--output", folder / "three")
    assert result.returncode != 0
    assert "multiple of 96 (blocks of 32 tokens x 3 processes), got 128" in result.stderr
    before_error = result.stderr.split("calm: error")[0]
    assert 'Traceback (most recent call last):\n  File "<frozen runpy>' not in before_error
    assert not (folder / "three").exists()
