"""Prepared folders: the split is by document, and the folder appears complete or not at all."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch

from calm.core.chunks import IGNORED_LABEL
from calm.data import prepared as prepared_module
from calm.data.options import ReadingOptions
from calm.data.prepare import prepare
from calm.data.prepared import PreparedData, held_out_data, is_prepared, load_prepared
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError

# 30 documents, some of them up to three times.
DISTINCT = list(stories(0, 30))
DOCUMENTS = DISTINCT + DISTINCT[::2] + DISTINCT[::3]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "documents.jsonl", DOCUMENTS)


def write_source(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def prepare_here(source, output, **settings):
    return prepare([str(source)], output, **({"vocab_size": 300, "num_proc": 1} | settings))


def texts_of(data, split):
    return data.tokenizer.batch_decode(list(getattr(data, split)["input_ids"]), skip_special_tokens=True)


def everything_below(folder):
    """Paths and contents, to check that nothing changed."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_split_is_by_document(source, tmp_path):
    """Equal documents are on one side, no document is on both, none is lost."""
    data = prepare_here(source, tmp_path / "out", validation_fraction=0.2)
    train, validation = texts_of(data, "train"), texts_of(data, "validation")
    assert not set(train) & set(validation)
    assert len(set(validation)) == 6  # A fifth of the 30 distinct documents.
    assert Counter(train + validation) == Counter(DOCUMENTS)


def test_splits_keep_the_order_of_documents(source, tmp_path):
    data = prepare_here(source, tmp_path / "out", validation_fraction=0.2)
    for split in ("train", "validation"):
        texts = texts_of(data, split)
        assert texts == [text for text in DOCUMENTS if text in set(texts)]


def test_what_is_held_out_depends_on_seed_and_text_only(source, tmp_path):
    """Not on the order of the documents, nor on the run."""
    backwards = write_source(tmp_path / "backwards.jsonl", DOCUMENTS[::-1])
    first = prepare_here(source, tmp_path / "a", validation_fraction=0.2, seed=3)
    second = prepare_here(source, tmp_path / "b", validation_fraction=0.2, seed=3)
    other_order = prepare_here(backwards, tmp_path / "c", validation_fraction=0.2, seed=3)
    other_seed = prepare_here(source, tmp_path / "d", validation_fraction=0.2, seed=4)
    for split in ("train", "validation"):
        assert list(getattr(first, split)["input_ids"]) == list(getattr(second, split)["input_ids"])
        assert Counter(texts_of(first, split)) == Counter(texts_of(other_order, split))
    assert set(texts_of(first, "validation")) != set(texts_of(other_seed, "validation"))


@pytest.mark.parametrize(("fraction", "held_out"), [(1e-6, 1), (0.999999, 29)])
def test_neither_split_is_empty(fraction, held_out, source, tmp_path):
    data = prepare_here(source, tmp_path / "out", validation_fraction=fraction)
    assert len(set(texts_of(data, "validation"))) == held_out
    assert len(set(texts_of(data, "train"))) == 30 - held_out


def test_contents_of_the_prepared_folder(source, tmp_path):
    data = prepare_here(source, tmp_path / "deep" / "out")
    folder = tmp_path / "deep" / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checksums.json",
        "prepared.json",
        "tokenizer",
        "train",
        "validation",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert is_prepared(folder) and not is_prepared(tmp_path)
    info = json.loads((folder / "prepared.json").read_text())
    assert info["sources"] == [str(source)] and info["vocab_size"] == data.vocab_size == len(data.tokenizer)
    assert info["documents"] == {"train": len(data.train), "validation": len(data.validation)}
    reloaded = load_prepared(folder)
    assert list(reloaded.train["input_ids"]) == list(data.train["input_ids"])
    assert reloaded.tokenizer.get_vocab() == data.tokenizer.get_vocab()


def test_documents_begin_with_bos_and_lack_eos(source, tmp_path):
    """BOS in front and no EOS: chunking adds it."""
    data = prepare_here(source, tmp_path / "out")
    assert data.train.column_names == data.validation.column_names == ["input_ids"]
    for ids in data.train["input_ids"]:
        assert ids[0] == data.tokenizer.bos_token_id and data.tokenizer.eos_token_id not in ids


def test_only_the_first_tokens_of_a_long_text_are_counted(source, tmp_path, monkeypatch):
    prepare_here(source, tmp_path / "data")
    data = load_prepared(tmp_path / "data")
    documents = [[*tokens, data.tokenizer.eos_token_id] for tokens in data.train["input_ids"]]
    all_counts = Counter(token for document in documents for token in document)
    assert data.token_counts().tolist() == [all_counts[token] for token in range(data.vocab_size)]
    monkeypatch.setattr(prepared_module, "_MAX_TOKENS_COUNTED", len(documents[0]) + 1)
    first_counts = Counter(documents[0] + documents[1])
    assert data.token_counts().tolist() == [first_counts[token] for token in range(data.vocab_size)]


def test_training_stream_joins_documents_with_eos(source, tmp_path, monkeypatch):
    """For any number of documents read at once; a document without tokens is just EOS."""
    data = prepare_here(source, tmp_path / "data")
    empty = datasets.Dataset.from_dict({"input_ids": [[], []]}, features=data.train.features)
    train = datasets.concatenate_datasets([empty, data.train, empty])
    end = data.tokenizer.eos_token_id
    expected = [[*tokens, end] for tokens in train["input_ids"]]
    for batch_size in (1000, 3):
        monkeypatch.setattr(prepared_module, "_READ_AT_ONCE", batch_size)
        stream, lengths = dataclasses.replace(data, train=train).training_stream()
        assert stream.tolist() == [token for tokens in expected for token in tokens]
        assert lengths.tolist() == [len(tokens) for tokens in expected]
    stream, lengths = dataclasses.replace(data, train=train.select([])).training_stream()
    assert stream.tolist() == lengths.tolist() == []


def test_vocabulary_is_trained_on_training_documents_only(tmp_path):
    train, held_out = write_source(tmp_path / "a.jsonl", ["aaaa"] * 3), tmp_path / "b.jsonl"
    write_source(held_out, ["zqzqzqzq " * 9])
    data = prepare_here(train, tmp_path / "out", vocab_size=1000, validation_sources=[str(held_out)])
    assert "aa" in data.tokenizer.get_vocab() and "zq" not in data.tokenizer.get_vocab()


def test_validation_sources_are_held_out(source, tmp_path):
    other = list(stories(1, 5))
    held_out = write_source(tmp_path / "held_out.jsonl", other)
    data = prepare_here(source, tmp_path / "out", validation_sources=[str(held_out)])
    assert texts_of(data, "train") == DOCUMENTS
    assert texts_of(data, "validation") == other


def test_one_document_is_enough_with_validation_sources(tmp_path):
    train = write_source(tmp_path / "1.jsonl", ["one"])
    held_out = write_source(tmp_path / "2.jsonl", ["two"])
    data = prepare_here(train, tmp_path / "out", validation_sources=[str(held_out)])
    assert (texts_of(data, "train"), texts_of(data, "validation")) == (["one"], ["two"])


def test_given_tokenizer_is_used(source, tmp_path):
    tokenizer = train_tokenizer(stories(5, 20), 320)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = prepare_here(source, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert Counter(texts_of(data, "train") + texts_of(data, "validation")) == Counter(DOCUMENTS)


@pytest.mark.parametrize("documents", [["only one"], ["the same"] * 4])
def test_one_document_cannot_be_split(documents, tmp_path):
    path = write_source(tmp_path / "a.jsonl", documents)
    with pytest.raises(InputError, match=r"a\.jsonl holds a single document.*--separator.*--validation"):
        prepare_here(path, tmp_path / "out")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_bad_fractions_are_refused(fraction, source, tmp_path):
    with pytest.raises(InputError, match=f"validation_fraction must lie between 0 and 1, got {fraction}"):
        prepare_here(source, tmp_path / "out", validation_fraction=fraction)


FAILURES = {
    "vocabulary": {"vocab_size": 10},
    "fraction": {"validation_fraction": 1.0},
    "tokenizer": {"tokenizer": "none.json"},
    "validation": {"validation_sources": ["none.txt"]},
    "field": {"options": ReadingOptions(text_field="body")},
}


@pytest.mark.parametrize("settings", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_behind_after_a_failure(settings, overwrite, source, tmp_path):
    """And whatever was in the output folder stays as it was."""
    output = tmp_path / "out"
    if overwrite:
        output.mkdir()
        (output / "mine.txt").write_text("mine")
    before = everything_below(tmp_path)
    with pytest.raises(InputError):
        prepare_here(source, output, overwrite=overwrite, **settings)
    assert everything_below(tmp_path) == before


def test_an_output_that_is_not_empty_is_refused(source, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    before = everything_below(tmp_path)
    with pytest.raises(InputError, match=r"out' is not empty; choose another or pass --overwrite"):
        prepare_here(source, output)
    assert everything_below(tmp_path) == before


def test_an_output_that_is_a_file_is_refused(source, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="cannot be a folder"):
        prepare_here(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_below_a_file_is_refused(source):
    with pytest.raises(InputError, match=r"documents\.jsonl"):
        prepare_here(source, source / "out")


def test_current_folder_as_output_is_refused(source, tmp_path, monkeypatch):
    """The finished folder is renamed into place, and `Path()` is no name to rename to."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(InputError, match="output"):
        prepare_here(source, Path())


def test_an_empty_folder_may_be_the_output(source, tmp_path):
    (tmp_path / "out").mkdir()
    prepare_here(source, tmp_path / "out")
    assert is_prepared(tmp_path / "out")


def test_overwrite_replaces_the_whole_folder(source, tmp_path):
    output = tmp_path / "out"
    prepare_here(source, output, seed=0)
    (output / "train/cache-stale.arrow").write_text("stale")
    other = write_source(tmp_path / "other.jsonl", ["one", "two", "three"])
    data = prepare_here(other, output, overwrite=True)
    assert Counter(texts_of(data, "train") + texts_of(data, "validation")) == Counter(["one", "two", "three"])
    assert not (output / "train/cache-stale.arrow").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents.jsonl", "other.jsonl", "out"]


def test_folder_without_prepared_text_is_refused(tmp_path):
    (tmp_path / "some.txt").write_text("text")
    for path in (tmp_path, tmp_path / "none", tmp_path / "some.txt"):
        with pytest.raises(InputError, match=r"is not a prepared folder .*run `calm prepare` first"):
            load_prepared(path)


@pytest.mark.parametrize(
    "lost", ["train/dataset_info.json", "validation/state.json", "tokenizer/tokenizer.json"]
)
def test_folder_with_a_missing_file_is_refused(lost, source, tmp_path):
    prepare_here(source, tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    with pytest.raises(InputError, match=rf"out' is damaged: {lost} is missing; prepare it again"):
        load_prepared(tmp_path / "out")


@pytest.mark.parametrize("layout", ["documents", "packed"])
def test_blocks_hold_the_documents_of_the_split(layout, source, tmp_path):
    data = prepare_here(source, tmp_path / "out", validation_fraction=0.2)
    blocks = data.blocks("validation", chunk_size=4, block_size=32, layout=layout)
    assert set(blocks.column_names) == {"input_ids", "labels", "position_ids", "document_ids"}
    labels = blocks[:]["labels"]
    assert isinstance(labels, torch.Tensor) and labels.shape[1] == 32
    assert blocks[:]["position_ids"].shape == (len(blocks), 8)
    eos = data.tokenizer.eos_token_id
    expected = [token for ids in data.validation["input_ids"] for token in (*ids, eos)]
    assert labels[labels != IGNORED_LABEL].tolist() == expected


def test_offsets_do_not_repeat_from_one_batch_to_the_next(tmp_path):
    """`datasets` hands over 1000 documents at a time; document 1000 must not count as document 0 again."""
    num = 2500
    documents = datasets.Dataset.from_dict({"input_ids": [[5, 5, 5]] * num})
    data = PreparedData(documents, documents, train_tokenizer(["a"], 259), "digest", tmp_path)
    rows = data.blocks("train", chunk_size=4, block_size=8)[:]["labels"].view(-1, 4)
    # Three tokens and EOS: a document begins in each chunk that is its first.
    is_start = ((rows == 5).cumsum(-1) == 1).any(-1) & ((rows == 5).any(-1))
    starts = rows[is_start & (rows.roll(1, 0)[:, -1] != 5)]
    offsets = (starts == 5).int().argmax(-1)
    assert len(offsets) == num
    assert not torch.equal(offsets[:500], offsets[1000:1500])
    assert not torch.equal(offsets[:500], offsets[2000:])


def test_bad_block_size_is_refused(source, tmp_path):
    data = prepare_here(source, tmp_path / "out")
    with pytest.raises(InputError, match="multiple of the chunk size 4"):
        data.blocks("train", chunk_size=4, block_size=10)


def test_held_out_text_with_the_models_tokenizer(source):
    tokenizer = train_tokenizer(stories(5, 20), 320)
    data = held_out_data([str(source)], tokenizer, ReadingOptions())
    assert texts_of(data, "validation") == DOCUMENTS
    assert len(data.train) == 0 and data.tokenizer is tokenizer


def test_held_out_part_of_a_prepared_folder(source, tmp_path):
    prepared = prepare_here(source, tmp_path / "out", validation_fraction=0.2)
    data = held_out_data([str(tmp_path / "out")], prepared.tokenizer, ReadingOptions())
    assert list(data.validation["input_ids"]) == list(prepared.validation["input_ids"])


def test_held_out_folder_of_another_tokenizer_is_refused(source, tmp_path):
    prepare_here(source, tmp_path / "out")
    other = train_tokenizer(stories(5, 20), 320)
    with pytest.raises(InputError, match=r"out' was prepared with a different tokenizer from the model's"):
        held_out_data([str(tmp_path / "out")], other, ReadingOptions())
