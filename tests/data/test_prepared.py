"""Prepared text is checked when it is opened, and cached blocks are rebuilt if they are damaged."""

import json
import logging
import os
import shutil

import pytest

from calm.data import prepared as prepared_module
from calm.data.options import ReadingOptions
from calm.data.prepare import prepare
from calm.data.prepared import digest_of, held_out_data, load_prepared
from calm.data.stories import stories, write_stories
from calm.errors import InputError

SETTINGS = {"chunk_size": 4, "block_size": 32}


@pytest.fixture
def folder(tmp_path):
    write_stories(tmp_path / "text.jsonl", 0, 60)
    prepare([str(tmp_path / "text.jsonl")], tmp_path / "out", vocab_size=300, num_proc=1)
    return tmp_path / "out"


def flip_a_bit(file, position=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "name",
    ["train/data-00000-of-00001.arrow", "validation/state.json", "tokenizer/tokenizer.json", "prepared.json"],
)
def test_flipped_bit_is_detected_and_its_file_named(name, position, folder):
    load_prepared(folder)
    flip_a_bit(folder / name, position)
    with pytest.raises(InputError, match=rf"out' is damaged: {name} has changed since it was written"):
        load_prepared(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 1}', '{"files": {"a": 2}}', "\0" * 9])
def test_damaged_checksum_file_is_named(content, folder):
    (folder / "checksums.json").write_text(content)
    with pytest.raises(InputError, match=r"out' is damaged: checksums\.json cannot be read"):
        load_prepared(folder)


def test_missing_checksum_file_is_named(folder):
    (folder / "checksums.json").unlink()
    with pytest.raises(InputError, match=r"earlier version, or checksums\.json is missing"):
        load_prepared(folder)


def blocks_as_json(data, **changes):
    return json.dumps(data.blocks("train", **SETTINGS, **changes).with_format(None)[:])


def test_blocks_are_cached_and_rebuilt_if_damaged(folder, monkeypatch, caplog):
    calls, make = [], prepared_module.make_blocks
    monkeypatch.setattr(prepared_module, "make_blocks", lambda *a, **k: calls.append(1) or make(*a, **k))
    expected = blocks_as_json(load_prepared(folder))
    assert (blocks_as_json(load_prepared(folder)), len(calls)) == (expected, 1)
    (file,) = (folder / "blocks").glob("train-*.arrow")
    for num_builds, damage in enumerate(
        (flip_a_bit, lambda file: flip_a_bit(file, 0.9), lambda file: file.write_bytes(b""),
         lambda file: file.with_name(f"{file.name}.sum").unlink(), lambda file: file.unlink()), 2
    ):  # fmt: skip
        damage(file)
        assert (blocks_as_json(load_prepared(folder)), len(calls)) == (expected, num_builds)
    assert "holds blocks of train that are damaged or incomplete" in caplog.text


def test_blocks_depend_on_text_seed_and_layout(folder, tmp_path):
    data = load_prepared(folder)
    variants = [blocks_as_json(data), blocks_as_json(data, seed=1), blocks_as_json(data, layout="packed")]
    # Another text, beside a copy of the cached blocks of the first.
    write_stories(tmp_path / "other.jsonl", 1, 60)
    other = prepare([str(tmp_path / "other.jsonl")], tmp_path / "other", vocab_size=300, num_proc=1)
    shutil.copytree(folder / "blocks", tmp_path / "other/blocks")
    variants.append(blocks_as_json(other))
    assert len(set(variants)) == 4


def test_digest_depends_on_text_and_tokenizer_only(folder, tmp_path, monkeypatch):
    digest = load_prepared(folder).digest
    source = [str(tmp_path / "text.jsonl")]
    assert prepare(source, tmp_path / "two", vocab_size=300, num_proc=2).digest == digest
    assert prepare(source, tmp_path / "other", vocab_size=301, num_proc=1).digest != digest
    assert prepare(source, tmp_path / "seed", vocab_size=300, num_proc=1, seed=1).digest != digest
    # The digest is computed from the data if the folder does not record it.
    data = load_prepared(folder)
    assert digest_of(data.train, data.validation, data.tokenizer) == digest
    assert digest_of(data.train.select(range(9)), data.validation, data.tokenizer) != digest
    shortened = data.train.map(lambda row: {"input_ids": row["input_ids"][:-1]})
    assert digest_of(shortened, data.validation, data.tokenizer) != digest


@pytest.mark.skipif(os.name == "nt", reason="permissions of folders work differently there")
def test_blocks_of_a_read_only_folder_are_cached_elsewhere(folder, monkeypatch, caplog):
    expected = blocks_as_json(load_prepared(folder))
    shutil.rmtree(folder / "blocks")
    before = sorted(folder.rglob("*"))
    original = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and original(path, mode))
    with caplog.at_level(logging.INFO):
        assert blocks_as_json(load_prepared(folder)) == expected
    assert sorted(folder.rglob("*")) == before
    assert "out' cannot be written; blocks of its text are kept in" in caplog.text


def test_scoring_held_out_text_leaves_no_cache_behind(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "held_out.txt").write_text("\n".join(stories(3, 5)))
    tokenizer = load_prepared(folder).tokenizer
    data = held_out_data([str(tmp_path / "held_out.txt")], tokenizer, ReadingOptions())
    assert len(data.blocks("validation", **SETTINGS)) > 5
    assert not (tmp_path / "cache").exists()


def test_beginnings_are_short_in_text_without_spaces(tmp_path):
    """Otherwise it would be the whole document, which may be longer than any context."""
    text = "".join(chr(0x4E00 + 7 * i % 400) for i in range(3000))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text[i:]}) + "\n" for i in range(9)))
    settings = {"vocab_size": 300, "num_proc": 1, "validation_fraction": 0.2}
    data = prepare([str(tmp_path / "text.jsonl")], tmp_path / "out", **settings)
    [(start, continuation)] = data.held_out_beginnings(1)
    assert 0 < len(start) < 500 and start + continuation in [text[i:] for i in range(9)]
