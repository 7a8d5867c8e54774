"""A kill while a folder is emptied or replaced loses nothing; only what calm wrote is replaced at all."""

import os
import shutil
from pathlib import Path

import pytest

from calm.errors import InputError
from calm.storage.disk import unfinished_name, write_atomically
from calm.storage.folders import atomic_folder, check_file, check_inputs_outside, emptied, restore
from calm.storage.ours import FINETUNED, MODEL, PREPARED, TRAINED, check_replaceable

KILLED = 9
# Contents of the files by which calm recognizes its own folders.
SIGNS = {
    "recipe.yaml": "seed: 1\nchunk_size: 4\ndata:\nlanguage_model:\n",
    "prepared.json": '{"sources": [], "vocab_size": 9, "seed": 0}',
    "config.json": '{"model_type": "calm"}',
}


def contents_of(folder: Path):
    """All files below a folder, with their contents."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def run_until_killed(work, after: int) -> bool:
    """Run in a child process that dies after some changes to files and folders; whether it died."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    left = after

    def dying(change):
        def changed(*args, **kwargs):
            nonlocal left
            if left == 0:
                os._exit(KILLED)
            left -= 1
            return change(*args, **kwargs)

        return changed

    for name in ("rename", "mkdir", "rmdir", "unlink"):
        setattr(Path, name, dying(getattr(Path, name)))
    shutil.rmtree = dying(shutil.rmtree)
    try:
        work()
    finally:
        os._exit(0)


@pytest.fixture
def old_run(tmp_path):
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "model/weights").write_text("old")
    (folder / "recipe.yaml").write_text("old")
    (folder / ".lock").write_text("kept")
    return folder


def test_kill_while_a_folder_is_emptied_loses_nothing(old_run):
    before, num_changes, outcomes = contents_of(old_run), 0, []

    def replace():
        with emptied(old_run, [".lock"]):
            (old_run / "recipe.yaml").write_text("new")
            (old_run / "data").mkdir()

    while run_until_killed(replace, num_changes):
        restore(old_run, [".lock"])
        outcomes.append("new" if (old_run / "recipe.yaml").read_text() == "new" else "old")
        if outcomes[-1] == "old":
            assert contents_of(old_run) == before, num_changes
        num_changes += 1
        shutil.rmtree(old_run)
        (old_run / "model").mkdir(parents=True)
        for name, text in before.items():
            (old_run / name).write_text(text)
    assert outcomes == sorted(outcomes, reverse=True)  # First only old contents, then only new ones.
    assert {"old", "new"} == set(outcomes)
    assert contents_of(old_run) == {"recipe.yaml": "new", ".lock": "kept"}


def test_kill_while_a_folder_is_restored_loses_nothing(old_run):
    before = contents_of(old_run)
    for number in range(20):
        run_until_killed(lambda: _die_in(old_run), 100)
        killed = run_until_killed(lambda: restore(old_run, [".lock"]), number)
        restore(old_run, [".lock"])
        assert contents_of(old_run) == before, number
        if not killed:
            return
    raise AssertionError("killed every time")


def _die_in(folder: Path):
    with emptied(folder, [".lock"]):
        (folder / "recipe.yaml").write_text("new")
        os._exit(KILLED)


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt(), OSError(28, "no space")])
def test_error_in_an_emptied_folder_restores_it(error, old_run):
    before = contents_of(old_run)
    with pytest.raises(type(error)), emptied(old_run, [".lock"]):
        (old_run / "new").write_text("new")
        raise error
    assert contents_of(old_run) == before
    assert sorted(path.name for path in old_run.iterdir()) == [".lock", "model", "recipe.yaml"]


def _prepared(folder: Path, text: str):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prepared.json").write_text(SIGNS["prepared.json"])
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train/state.json").write_text(text)


def test_kill_while_a_folder_is_replaced_leaves_the_old_or_new_one(tmp_path):
    path = tmp_path / "text"

    def replace():
        with atomic_folder(path, PREPARED) as folder:
            _prepared(folder, "new")

    for number in range(30):
        _prepared(path, "old")
        killed = run_until_killed(replace, number)
        assert killed or number > 5
        with pytest.raises(RuntimeError), atomic_folder(path, PREPARED):  # The next use repairs it.
            raise RuntimeError
        assert (path / "train/state.json").read_text() in ("old", "new"), number
        assert [entry.name for entry in tmp_path.iterdir()] == ["text"]
        if not killed:
            return
    raise AssertionError("killed every time")


def test_replacing_a_link_replaces_its_target(tmp_path):
    _prepared(tmp_path / "disk/text", "old")
    (tmp_path / "text").symlink_to(tmp_path / "disk/text")
    with atomic_folder(tmp_path / "text", PREPARED) as folder:
        _prepared(folder, "new")
    assert (tmp_path / "text").is_symlink()
    assert (tmp_path / "disk/text/train/state.json").read_text() == "new"
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["text"]


FOREIGN = {
    "documents": ({"letter.txt": "", "photos/one.jpg": ""}, "it does not hold a run of calm train"),
    "prepared text": ({"prepared.json": "", "train/state.json": ""}, "it does not hold a run of calm train"),
    "a recipe by hand": ({"recipe.yaml": "seed: 3\n", "report.html": ""}, "it does not hold a run of calm"),
    "a fine-tuned model": ({"recipe.yaml": "seed: 1\nexamples:\nlora:\n"}, "it does not hold a run of calm"),
    "notes in a run": ({"recipe.yaml": None, "notes.txt": ""}, "it holds 'notes.txt'"),
    "notes deep in a run": ({"recipe.yaml": None, "model/thoughts.txt": ""}, "it holds 'model/thoughts.txt'"),
    "weights of one's own": ({"recipe.yaml": None, "model/mine.safetensors": ""}, "it holds 'model/mine"),
    "notes in a checkpoint": (
        {"recipe.yaml": None, "checkpoints/autoencoder/checkpoint-30/thesis.txt": ""},
        "it holds 'checkpoints/autoencoder/checkpoint-30/thesis.txt'",
    ),
    "notes among logs": (
        {"recipe.yaml": None, "checkpoints/autoencoder/tensorboard/n/x": ""},
        "it holds 'checkpoints/autoencoder/tensorboard/n'",
    ),
    "notes among blocks": ({"recipe.yaml": None, "data/blocks/thesis.txt": ""}, "data/blocks/thesis.txt"),
    "something hidden": ({"recipe.yaml": None, ".thesis.partial/a": ""}, "it holds '.thesis.partial'"),
    "a repository": ({"recipe.yaml": None, ".git/config": ""}, "it holds '.git'"),
    "a folder named as a file": ({"recipe.yaml": None, "history.json/x": ""}, "it holds 'history.json'"),
    "a file named as a folder": ({"recipe.yaml": None, "model": ""}, "it holds 'model'"),
    "text beside a run": ({"recipe.yaml": None, "data/train/mine.jsonl": ""}, "it holds 'data/train/mine"),
}


@pytest.mark.parametrize(("files", "message"), FOREIGN.values(), ids=FOREIGN)
def test_folders_with_foreign_files_are_not_replaced(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SIGNS[name] if text is None else text)
    with pytest.raises(InputError, match="cannot be replaced") as error:
        check_replaceable(tmp_path, TRAINED)
    assert message in str(error.value)


def test_emptying_a_run_removes_links_but_not_their_targets(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/letter.txt").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(SIGNS["recipe.yaml"])
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    check_replaceable(run, TRAINED)
    with emptied(run):
        pass
    assert (tmp_path / "disk/letter.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", [TRAINED, FINETUNED, PREPARED, MODEL], ids=lambda kind: kind.name)
def test_current_and_home_folder_and_their_parents_are_never_replaced(kind, tmp_path, monkeypatch):
    inner = tmp_path / "home/person"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent, tmp_path):
        (folder / kind.sign).write_text(SIGNS[kind.sign])
    (tmp_path / "link").symlink_to(inner)
    monkeypatch.chdir(inner)
    for path in (Path(), Path(".."), Path("../person"), inner, tmp_path, tmp_path / "link", Path("/")):
        with pytest.raises(InputError, match="the current folder, which is never replaced"):
            check_replaceable(path, kind)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(inner))
    for path in (inner, inner.parent, tmp_path / "link"):
        with pytest.raises(InputError, match="your home folder, which is never replaced"):
            check_replaceable(path, kind)


def test_inputs_in_the_output_folder_are_refused_by_any_name(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "text.txt").write_text("")
    (tmp_path / "link").symlink_to(run)
    for output, source in ((run, run), (run, run / "text.txt"), (tmp_path / "link", run / "text.txt"),
                           (run, tmp_path / "link/text.txt"), (run / ".." / "run", run)):  # fmt: skip
        with pytest.raises(InputError, match="lies in the output folder"):
            check_inputs_outside(output, [str(source)])
    check_inputs_outside(run, [str(tmp_path), "owner/name", "~nobody-of-that-name/run"])
    monkeypatch.setenv("HOME", str(tmp_path))  # A model may be named ~/run.
    with pytest.raises(InputError, match="'~/run' lies in the output folder"):
        check_inputs_outside(run, ["~/run"])


def test_file_is_not_written_over_a_folder_or_below_a_file(tmp_path):
    (tmp_path / "report.html").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a folder"):
        check_file(tmp_path / "report.html", overwrite=True)
    with pytest.raises(InputError, match="is a file, not a folder"):
        check_file(tmp_path / "file/report.html", overwrite=True)


def test_file_is_written_through_links_but_not_into_a_pipe(tmp_path):
    (tmp_path / "empty").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"is a link to '.*nowhere', which does not exist"):
            check_file(tmp_path / "empty", overwrite)
        for name in ("pipe", "to pipe"):
            with pytest.raises(InputError, match="is a device or a pipe"):
                check_file(tmp_path / name, overwrite)
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    check_file(tmp_path / "link", overwrite=True)
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, None])
def test_writing_a_file_leaves_its_neighbors_alone(error, tmp_path, monkeypatch):
    neighbors = {"report.partial": "mine", ".report.html.partial": "mine", "report": "mine"}
    for name, text in neighbors.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "report.html").chmod(0o640)
    if error is None:
        write_atomically(tmp_path / "report.html", "new")
        assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o640
    else:

        def failing(*_):
            raise error

        monkeypatch.setattr(Path, "replace", failing)
        with pytest.raises(error):
            write_atomically(tmp_path / "report.html", "new")
    assert contents_of(tmp_path) == {**neighbors, "report.html": "old" if error else "new"}


def test_files_with_names_of_maximal_length_are_written(tmp_path):
    for name in ("n" * 255, "\N{FACE WITH TEARS OF JOY}" * 63):
        write_atomically(tmp_path / name, "text")
    assert len(contents_of(tmp_path)) == 2


def test_leftovers_of_a_killed_write_do_no_harm(tmp_path):
    (tmp_path / "recipe.yaml").write_text(SIGNS["recipe.yaml"])
    (tmp_path / unfinished_name("history.json", "1234abcd")).write_text("{")
    (tmp_path / "history.partial").write_text("{")  # Of earlier versions.
    check_replaceable(tmp_path, TRAINED)
    write_atomically(tmp_path / "history.json", "{}")
    assert (tmp_path / "history.json").read_text() == "{}"


@pytest.mark.parametrize("name", [".text.partial", ".text.replaced"])
def test_foreign_folder_with_a_temporary_name_is_not_overwritten(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is in the way"), atomic_folder(tmp_path / "text"):
        pass
    assert contents_of(tmp_path) == {f"{name}/thesis.txt": "mine"}
    (tmp_path / ".text.lock").write_text("")  # As a killed command leaves it.
    if name == ".text.partial":
        with atomic_folder(tmp_path / "text") as folder:
            (folder / "new").write_text("new")
    else:  # It is put back first.
        with pytest.raises(InputError, match="is not empty"), atomic_folder(tmp_path / "text"):
            pass
        assert contents_of(tmp_path / "text") == {"thesis.txt": "mine"}
    assert not (tmp_path / name).exists()
