"""Prepared text is as it was written, or is said not to be; blocks that are kept are checked as well."""

import json
import logging
import os
import shutil

import pytest

from calm.data import prepared as opening
from calm.data.prepare import prepare
from calm.data.prepared import load_prepared
from calm.data.stories import stories, write_stories
from calm.errors import InputError

SETTINGS = {"chunk_size": 4, "block_size": 32}


@pytest.fixture
def folder(tmp_path):
    write_stories(tmp_path / "text.jsonl", 0, 60)
    prepare([str(tmp_path / "text.jsonl")], tmp_path / "out", vocab_size=300, num_proc=1)
    return tmp_path / "out"


def flip_a_bit(file, place=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "name",
    ["train/data-00000-of-00001.arrow", "validation/state.json", "tokenizer/tokenizer.json", "prepared.json"],
)
def test_a_flipped_bit_is_found_and_its_file_named(name, place, folder):
    load_prepared(folder)
    flip_a_bit(folder / name, place)
    with pytest.raises(InputError, match=rf"out' is damaged: {name} has changed since it was written"):
        load_prepared(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 1}', '{"files": {"a": 2}}', "\0" * 9])
def test_checksums_that_are_damaged_themselves_are_named(content, folder):
    (folder / "checksums.json").write_text(content)
    with pytest.raises(InputError, match=r"out' is damaged: checksums\.json cannot be read"):
        load_prepared(folder)


def test_checksums_that_are_gone_are_named(folder):
    (folder / "checksums.json").unlink()
    with pytest.raises(InputError, match=r"earlier version, or checksums\.json is missing"):
        load_prepared(folder)


def rows(data, **changes):
    return json.dumps(data.blocks("train", **SETTINGS, **changes).with_format(None)[:])


def test_blocks_are_made_once_and_again_if_they_are_damaged(folder, monkeypatch, caplog):
    calls, make = [], opening.make_blocks
    monkeypatch.setattr(opening, "make_blocks", lambda *a, **k: calls.append(1) or make(*a, **k))
    good = rows(load_prepared(folder))
    assert (rows(load_prepared(folder)), len(calls)) == (good, 1)
    (file,) = (folder / "blocks").glob("train-*.arrow")
    for number, damage in enumerate(
        (flip_a_bit, lambda file: flip_a_bit(file, 0.9), lambda file: file.write_bytes(b""),
         lambda file: file.with_name(f"{file.name}.sum").unlink(), lambda file: file.unlink()), 2
    ):  # fmt: skip
        damage(file)
        assert (rows(load_prepared(folder)), len(calls)) == (good, number)
    assert "holds blocks of train that are damaged or incomplete" in caplog.text


def test_blocks_of_other_text_or_settings_are_others(folder, tmp_path):
    data = load_prepared(folder)
    kinds = [rows(data), rows(data, seed=1), rows(data, layout="packed")]
    # Another text in the place of the first, with the blocks of the first.
    write_stories(tmp_path / "other.jsonl", 1, 60)
    other = prepare([str(tmp_path / "other.jsonl")], tmp_path / "other", vocab_size=300, num_proc=1)
    shutil.copytree(folder / "blocks", tmp_path / "other/blocks")
    kinds.append(rows(other))
    assert len(set(kinds)) == 4


def test_text_is_the_same_however_it_was_prepared(folder, tmp_path, monkeypatch):
    digest = load_prepared(folder).digest
    source = [str(tmp_path / "text.jsonl")]
    assert prepare(source, tmp_path / "two", vocab_size=300, num_proc=2).digest == digest
    assert prepare(source, tmp_path / "other", vocab_size=301, num_proc=1).digest != digest
    assert prepare(source, tmp_path / "seed", vocab_size=300, num_proc=1, seed=1).digest != digest
    # One that does not say it is asked for it.
    data = load_prepared(folder)
    assert opening.digest_of(data.train, data.validation, data.tokenizer) == digest
    assert opening.digest_of(data.train.select(range(9)), data.validation, data.tokenizer) != digest
    moved = data.train.map(lambda row: {"input_ids": row["input_ids"][:-1]})
    assert opening.digest_of(moved, data.validation, data.tokenizer) != digest


@pytest.mark.skipif(os.name == "nt", reason="folders are closed in another way there")
def test_text_on_a_disk_that_cannot_be_written(folder, monkeypatch, caplog):
    good = rows(load_prepared(folder))
    shutil.rmtree(folder / "blocks")
    before = sorted(folder.rglob("*"))
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and may(path, mode))
    with caplog.at_level(logging.INFO):
        assert rows(load_prepared(folder)) == good
    assert sorted(folder.rglob("*")) == before
    assert "out' cannot be written; blocks of its text are kept in" in caplog.text


def test_held_out_text_that_is_scored_whole_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "held_out.txt").write_text("\n".join(stories(3, 5)))
    tokenizer = load_prepared(folder).tokenizer
    data = opening.held_out_data([str(tmp_path / "held_out.txt")], tokenizer, opening.ReadingOptions())
    assert len(data.blocks("validation", **SETTINGS)) > 5
    assert not (tmp_path / "cache").exists()


def test_a_beginning_is_short_in_text_without_spaces(tmp_path):
    """Else it would be the whole document, which no context may hold."""
    text = "".join(chr(0x4E00 + 7 * place % 400) for place in range(3000))
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text[place:]}) + "\n" for place in range(9))
    )
    how = {"vocab_size": 300, "num_proc": 1, "validation_fraction": 0.2}
    data = prepare([str(tmp_path / "text.jsonl")], tmp_path / "out", **how)
    [(start, rest)] = data.held_out_beginnings(1)
    assert 0 < len(start) < 500 and start + rest in [text[place:] for place in range(9)]
