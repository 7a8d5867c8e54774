"""Damaged checkpoints are named and set aside, and a run resumes from the newest intact one."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import interrupt, toy_recipe

from calm.data.stories import write_stories
from calm.errors import InputError
from calm.storage.checksums import CHECKSUMS, find_damage, write_checksums
from calm.training import stages
from calm.training.checkpoints import (
    atomic_checkpoint,
    checkpoints_in,
    newest_intact_checkpoint,
    problems_of,
    step_of,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A recipe, the folder of a finished run, and that of a run that was stopped with two checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    text = root / "stories.jsonl"
    write_stories(text, 0, 12)
    recipe = toy_recipe(text)
    stages.train(recipe, root / "finished")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "language_model", 7)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, root / "stopped")
    return recipe, root / "finished", root / "stopped"


def remove_files(checkpoint):
    for path in checkpoint.iterdir():
        path.unlink()


def truncate(name):
    def damage(checkpoint):
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[: len(data) // 2])

    return damage


def flip_bit(name):
    def damage(checkpoint):
        data = bytearray((checkpoint / name).read_bytes())
        data[len(data) // 2] ^= 1
        (checkpoint / name).write_bytes(data)

    return damage


DAMAGE = {
    "optimizer emptied": (lambda checkpoint: (checkpoint / "optimizer.pt").write_bytes(b""), "optimizer.pt"),
    "weights cut": (truncate("model.safetensors"), "model.safetensors"),
    "weights missing": (lambda checkpoint: (checkpoint / "model.safetensors").unlink(), "model.safetensors"),
    "state missing": (lambda checkpoint: (checkpoint / "trainer_state.json").unlink(), "trainer_state.json"),
    "state garbage": (
        lambda checkpoint: (checkpoint / "trainer_state.json").write_text("{"),
        "trainer_state.json",
    ),
    "random states cut": (truncate("rng_state.pth"), "rng_state.pth"),
    "schedule missing": (lambda checkpoint: (checkpoint / "scheduler.pt").unlink(), "scheduler.pt"),
    "emptied": (remove_files, "missing"),
}
FLIPS = {
    f"a byte of {name}": (flip_bit(name), name)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "config.json")
}


@pytest.mark.parametrize(("damage", "expected"), (DAMAGE | FLIPS).values(), ids=DAMAGE | FLIPS)
def test_damage_is_found_and_named(damage, expected, runs, tmp_path):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(runs[2] / "checkpoints/language_model/checkpoint-6", checkpoint)
    assert problems_of(checkpoint) == []
    damage(checkpoint)
    assert expected in problems_of(checkpoint)[0]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_without_checksums_too(damage, expected, runs, tmp_path):
    """Checkpoints of earlier versions have none."""
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(runs[2] / "checkpoints/language_model/checkpoint-6", checkpoint)
    (checkpoint / CHECKSUMS).unlink()
    assert problems_of(checkpoint) == []
    damage(checkpoint)
    assert problems_of(checkpoint)


@pytest.mark.parametrize("kind", ["optimizer emptied", "emptied", "a byte of model.safetensors"])
def test_run_resumes_from_the_newest_intact_checkpoint(kind, runs, tmp_path, caplog):
    recipe, finished, source = runs
    shutil.copytree(source, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/language_model"
    (DAMAGE | FLIPS)[kind][0](folder / "checkpoint-6")
    for name in ("checkpoint-abc", "checkpoint-", "checkpoint--1"):
        (folder / name).mkdir()
    (folder / "checkpoint-99").write_text("a file")
    resumed = stages.train(recipe, tmp_path / "run", resume=True)
    first, second = (load_file(path / "model.safetensors") for path in (finished / "model", resumed))
    assert all((first[name] == second[name]).all() for name in first)
    assert "checkpoint-6' is damaged" in caplog.text and "continuing from 'checkpoint-3'" in caplog.text
    assert (folder / "damaged-checkpoint-6").is_dir()
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-6", "checkpoint-8"]
    assert all(problems_of(path) == [] for path in checkpoints_in(folder))


def test_nothing_is_removed_if_every_checkpoint_is_damaged(runs, tmp_path):
    recipe, _, source = runs
    shutil.copytree(source, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/language_model"
    for name in ("checkpoint-3", "checkpoint-6"):
        DAMAGE["optimizer emptied"][0](folder / name)
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(InputError, match=r"no checkpoint in .* is intact: 'checkpoint-6' is damaged \(opt"):
        stages.train(recipe, tmp_path / "run", resume=True)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_folder_without_checkpoints_has_no_newest_one(tmp_path):
    assert newest_intact_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-x").mkdir()
    assert newest_intact_checkpoint(tmp_path) is None and checkpoints_in(tmp_path) == []


def test_checksums_find_changed_files_and_ignore_new_ones(tmp_path):
    (tmp_path / "inner").mkdir()
    save_file({"a": torch.arange(4)}, tmp_path / "inner/a.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    write_checksums(tmp_path)
    assert find_damage(tmp_path) == []
    (tmp_path / "later").write_text("of no matter")
    assert find_damage(tmp_path) == []
    (tmp_path / "empty").write_bytes(b"1")
    flip_bit("inner/a.safetensors")(tmp_path)
    assert find_damage(tmp_path) == [
        "empty has 1 bytes instead of 0", "inner/a.safetensors has changed since it was written",
    ]  # fmt: skip
    for text in ("[", "[]", '{"files": {"a": 1}}', '{"files": []}'):
        (tmp_path / CHECKSUMS).write_text(text)
        assert find_damage(tmp_path) == ["checksums.json cannot be read"]


def test_checkpoints_appear_complete_and_the_oldest_is_removed(tmp_path):
    for step in (1, 2, 3):
        with atomic_checkpoint(tmp_path, step, keep=2) as partial:
            partial.mkdir(parents=True)
            (partial / "model.safetensors").write_bytes(b"weights")
            assert step not in map(step_of, checkpoints_in(tmp_path))
        assert problems_of(tmp_path / f"checkpoint-{step}") == []
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), atomic_checkpoint(tmp_path, 1, keep=2) as partial:
        partial.mkdir(parents=True)
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []
