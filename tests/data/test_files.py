"""Finding text in folders as they are: with hidden files, links, and what other programs left there."""

import json
import logging
import os
from pathlib import Path

import pytest

from calm.data import files
from calm.data.files import find_files
from calm.data.options import ReadingOptions
from calm.data.records import load_records
from calm.data.shards import find_shards
from calm.data.sources import load_documents
from calm.errors import InputError

SKIPPED = [
    ".ipynb_checkpoints/a-checkpoint.txt",
    "._a.txt",
    ".hidden.jsonl",
    "deep/.git/description.txt",
    ".Trash-1000/files/old.txt",
    "__MACOSX/a.txt",
    "$RECYCLE.BIN/S-1/x.txt",
    "System Volume Information/log.txt",
    "lost+found/1.txt",
    "@eaDir/a.txt",
    "deep/~$a.txt",
    ".venv/lib/top_level.txt",
    "node_modules/licence.txt",
    "code/__pycache__/x.txt",
    "code/thing.egg-info/SOURCES.txt",
]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "texts"


def write(*paths: Path, text: str = "text") -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_files(folder)]


def logged_messages(folder: Path, caplog) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        find_files(folder, log_excluded=True)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("path", SKIPPED)
def test_files_of_systems_and_editors_are_skipped(path, folder, caplog):
    write(folder / "a.txt", folder / "deep/b.txt", folder / path)
    assert names(folder) == ["a.txt", "deep/b.txt"]
    [message] = logged_messages(folder, caplog)
    assert message.startswith(f"read 2 files of '{folder}'; left out: ") and message.endswith(" (1)")


def test_hidden_files_and_folders_are_read_if_named(folder):
    write(folder / ".notes/a.txt", folder / ".notes/.b.txt", folder / "node_modules/c.txt")
    assert names(folder / ".notes") == ["a.txt"]
    assert find_files(folder / ".notes/.b.txt") == [folder / ".notes/.b.txt"]
    assert names(folder / "node_modules") == ["c.txt"]


def test_ordinary_folder_is_read_completely_and_silently(folder, caplog):
    for name in (
        "b/2.txt",
        "b.txt",
        "a/9.txt",
        "a/c/1.jsonl.gz",
        "z.parquet",
        "b-/x.TXT",
        "ä ö/1.txt",
        "~a.txt",
    ):
        write(folder / name)
    paths = find_files(folder)
    assert paths == sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(paths) == 8 and logged_messages(folder, caplog) == []


def test_links_are_followed_once(folder, tmp_path, caplog):
    outside = tmp_path / "outside"
    write(
        folder / "a.txt",
        outside / "deep/b.txt",
        outside / ".c.txt",
        tmp_path / "store/blob",
        tmp_path / "d.txt",
    )
    (folder / "link").symlink_to(outside)
    (folder / "link2").symlink_to(outside)
    (folder / "a-again.txt").symlink_to("a.txt")
    (folder / "d.txt").symlink_to(tmp_path / "d.txt")
    (folder / "blob.jsonl").symlink_to(tmp_path / "store/blob")
    os.link(folder / "a.txt", folder / "z.txt")
    assert names(folder) == ["a.txt", "blob.jsonl", "d.txt", "link/deep/b.txt"]
    [message] = logged_messages(folder, caplog)
    assert message == f"read 4 files of '{folder}'; left out: already read under another name (3), hidden (1)"


def test_redundant_links_change_nothing(folder):
    write(folder / "b/1.txt", folder / "b/2.txt", folder / "c.txt")
    before = find_files(folder)
    (folder / "a").symlink_to("b")
    (folder / "0.txt").symlink_to("c.txt")
    assert find_files(folder) == before


def test_loops_of_links_end(folder, caplog):
    write(folder / "a/1.txt", folder.parent / "beside.txt")
    (folder / "a/up").symlink_to("..")
    (folder / "a/itself").symlink_to("itself")
    (folder / "parent").symlink_to("..")
    assert names(folder) == ["a/1.txt", "parent/beside.txt"]
    assert "broken links (1)" in logged_messages(folder, caplog)[0]


def test_a_link_may_be_named_directly(folder, tmp_path):
    write(folder / "a.txt")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "link.txt").symlink_to(folder / "a.txt")
    assert names(tmp_path / "link") == ["a.txt"]
    assert find_files(tmp_path / "link.txt") == [tmp_path / "link.txt"]


def test_broken_links_unreadable_folders_and_other_formats_are_counted(folder, caplog, monkeypatch):
    write(folder / "a.txt", folder / "b.png", folder / "c.csv", folder / "locked/d.txt", folder / ".DS_Store")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    original = os.listdir

    def listdir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(files.os, "listdir", listdir)
    left_out = "broken links (1), other formats (3: .png 1, .csv 1, .txt 1), unreadable (1)"
    assert logged_messages(folder, caplog) == [f"read 1 file of '{folder}'; left out: {left_out}"]
    with pytest.raises(InputError, match=r"cannot open the folder '.*locked' \(.*Permission denied"):
        find_files(folder / "locked")


def test_runs_models_and_prepared_text_are_skipped(folder, caplog):
    write(folder / "a.txt", folder / "data/prepared.json", folder / "data/tokenizer/merges.txt")
    write(folder / "runs/x/recipe.yaml", folder / "runs/x/answers.jsonl", folder / "runs/x/model/config.json")
    write(folder / "gpt2/tokenizer_config.json", folder / "gpt2/vocab.txt")
    write(folder / "project/recipe.yaml", folder / "project/data/b.txt")  # Not written by calm.
    assert names(folder) == ["a.txt", "project/data/b.txt"]
    assert "runs, models and prepared text (3)" in logged_messages(folder, caplog)[0]


def test_folder_with_only_hidden_text_says_so(folder):
    write(folder / ".a.txt", folder / ".git/b.txt", folder / "c.png")
    with pytest.raises(
        InputError, match=r"holds no .*\(left out: hidden \(2\), other formats \(1: .png 1\)\); check"
    ):
        find_files(folder)


@pytest.mark.parametrize("source", ["", "  ", "x" * 5000 + "/y", "nul\0l"])
def test_odd_names_of_sources_are_refused(source):
    with pytest.raises(InputError, match=r"empty name|cannot access|there is no file or folder"):
        load_documents([source], ReadingOptions())


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        find_files(tmp_path / "pipe.txt")


def test_text_records_and_streams_skip_the_same_files(folder, tmp_path, caplog):
    records = [{"text": "a", "prompt": "p", "completion": "c"}]
    write(
        folder / "a.jsonl", folder / ".b.jsonl", text="".join(json.dumps(record) + "\n" for record in records)
    )
    (folder / "c.jsonl").symlink_to("a.jsonl")
    with caplog.at_level(logging.INFO):
        assert (
            len(load_documents([str(folder)], ReadingOptions(), cache_dir=str(tmp_path / "cache")).ranks) == 1
        )
        assert len(list(load_records([str(folder)]))) == 1
        [shard] = find_shards([str(folder)], ReadingOptions())
    assert list(shard.read()) == ["a"]
    messages = {record.getMessage() for record in caplog.records if record.name == "calm.data.files"}
    assert messages == {
        f"read 1 file of '{folder}'; left out: already read under another name (1), hidden (1)"
    }
