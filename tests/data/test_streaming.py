"""Streaming: each document goes to one reader once per epoch, and a stopped stream resumes exactly."""

import itertools
import json

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from calm.core.chunks import IGNORED_LABEL
from calm.data.options import ReadingOptions
from calm.data.pieces import rank_of
from calm.data.prepare import prepare
from calm.data.prepared import split_of
from calm.data.shards import find_shards
from calm.data.stories import stories
from calm.data.streaming import CURSOR, BlockStream, Cursor, Position, StreamSettings
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError

NUM_DOCUMENTS = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents in five files, and a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    documents = list(stories(0, NUM_DOCUMENTS))
    assert len(set(documents)) == NUM_DOCUMENTS
    for number in range(5):
        part = documents[number * 12 : (number + 1) * 12]
        lines = (json.dumps({"text": document}) + "\n" for document in part)
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder, documents, train_tokenizer(documents, 300)


def stream(text, position=None, process=0, **changes):
    folder, _, tokenizer = text
    settings = {"sources": [str(folder)], "options": ReadingOptions(), "chunk_size": 4, "block_size": 64}
    settings |= {"window": 7, "seed": 3} | changes
    return BlockStream(StreamSettings(**settings), tokenizer, position or Position(1, 1), process)


def epochs_of(reader, number):
    """All blocks of the first epochs."""
    return list(itertools.takewhile(lambda block: block[CURSOR][1] < number, reader))


def documents_in(blocks, tokenizer):
    """The texts in blocks: what lies between the ends of documents."""
    tokens = torch.cat([block["input_ids"][block["labels"] != IGNORED_LABEL] for block in blocks]).tolist()
    texts, document = [], []
    for token in tokens:
        if token == tokenizer.eos_token_id:
            texts.append(tokenizer.decode(document, skip_special_tokens=True))
            document = []
        else:
            document.append(token)
    assert not document
    return texts


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (1, 3), (2, 2), (3, 3)])
def test_readers_share_the_text_without_overlap(text, processes, workers):
    """With fewer readers than files, each has files of its own; with more, windows in turn."""
    _, documents, tokenizer = text
    for epoch in (1, 2):
        texts = []
        for process, worker in itertools.product(range(processes), range(workers)):
            reader = stream(text, Position(processes, workers), process)
            blocks = epochs_of(reader._read(process * workers + worker, processes * workers, worker), epoch)
            texts += documents_in([block for block in blocks if block[CURSOR][1] == epoch - 1], tokenizer)
        assert sorted(texts) == sorted(documents)


def test_order_changes_with_epoch_and_seed(text):
    _, documents, tokenizer = text
    blocks = epochs_of(stream(text), 2)
    texts = documents_in(blocks, tokenizer)
    first, second = texts[:NUM_DOCUMENTS], texts[NUM_DOCUMENTS:]
    assert sorted(first) == sorted(second) == sorted(documents)
    assert first != second and first != documents
    assert documents_in(epochs_of(stream(text), 1), tokenizer) == first
    assert documents_in(epochs_of(stream(text, seed=4), 1), tokenizer) != first
    for block in blocks:
        assert block["input_ids"].shape == block["labels"].shape == (64,)
        assert block["position_ids"].shape == (16,)


@pytest.mark.parametrize("workers", [0, 2, 7])
def test_stopped_stream_resumes_exactly(text, workers, tmp_path):
    """Even if workers prefetch."""

    def batches(position, count, record):
        loader = DataLoader(stream(text, position), batch_size=2, num_workers=workers)
        tokens = []
        for batch in itertools.islice(loader, count):
            record(*batch[CURSOR][-1].tolist())
            tokens.append(batch["input_ids"])
        return tokens

    def start_position():
        return Position(1, max(1, workers))

    expected = batches(start_position(), 40, lambda *_: None)
    assert len({tuple(row.tolist()) for batch in expected for row in batch}) > 60
    for stop in (1, 2, 5, 11, 23):
        position = start_position()
        before = batches(start_position(), stop, position.record)
        position.save(tmp_path / "position.json")
        restored = start_position()
        restored.load(tmp_path / "position.json")
        assert restored == position
        after = batches(restored, 40 - stop, lambda *_: None)
        assert all((a == b).all() for a, b in zip(before + after, expected, strict=True))


def test_held_out_documents_are_never_streamed(text, tmp_path):
    """Not even those outside the sample that was prepared."""
    folder, documents, _ = text
    data = prepare(
        [str(folder)], tmp_path / "data", vocab_size=300, validation_fraction=0.3, seed=5, max_documents=8
    )
    assert len(data.train) + len(data.validation) == 5 * 8
    highest = split_of(tmp_path / "data").highest
    expected = [document for document in documents if rank_of(document, 5) > highest]
    assert len(expected) < NUM_DOCUMENTS - len(data.validation)
    reader = BlockStream(
        StreamSettings(sources=[str(folder)], options=ReadingOptions(), chunk_size=4, block_size=64,
                       held_out_below=highest, held_out_seed=5),
        data.tokenizer, Position(1, 1),
    )  # fmt: skip
    assert sorted(documents_in(epochs_of(reader, 1), data.tokenizer)) == sorted(expected)


def test_hub_dataset_is_streamed(text, tmp_path, monkeypatch):
    folder, documents, tokenizer = text

    def load(name, config, split, streaming):
        assert (name, config, split) == ("someone/stories", None, "train")
        files = sorted(str(file) for file in folder.iterdir())
        return original("json", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path))

    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    shards = find_shards(["someone/stories"], ReadingOptions())
    assert len(shards) == 5
    assert sorted(document for shard in shards for document in shard.read()) == sorted(documents)
    reader = stream(text, sources=["someone/stories"])
    assert sorted(documents_in(epochs_of(reader, 1), tokenizer)) == sorted(documents)
    data = prepare(["someone/stories"], tmp_path / "data", vocab_size=300, max_documents=20)
    assert len(data.train) + len(data.validation) == 20
    with pytest.raises(InputError, match="has no field 'content'; its fields are text"):
        find_shards(["someone/stories"], ReadingOptions(text_field="content"))


def test_file_without_text_does_not_end_the_stream(text, tmp_path):
    """A reader whose share of an epoch is empty continues with the next epoch."""
    folder, documents, tokenizer = text
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "blank.jsonl").write_text("\n")
    texts = []
    for reader in range(6):
        block_stream = stream(text, Position(6, 1), sources=[str(tmp_path)])
        blocks = itertools.takewhile(lambda block: block[CURSOR][1] < 8, block_stream._read(reader, 6, 0))
        texts += documents_in(list(blocks), tokenizer)
    assert sorted(texts) == sorted(documents * 8)


def test_sources_without_text_for_every_reader_are_refused(text):
    with pytest.raises(InputError, match="there is no file or folder 'no/such/place'"):
        stream(text, sources=["no/such/place"])
    with pytest.raises(InputError, match="one of 1 readers finds no text"):
        next(iter(stream(text, held_out_below=2**64)))
    with pytest.raises(InputError, match=r"one of 12 readers finds no text .* smaller windows than 7"):
        list(stream(text, Position(3, 4))._read(11, 12, 3))  # There are nine windows.


def test_position_of_other_numbers_of_readers_is_refused(tmp_path):
    position = Position(2, 1, cursors={0: Cursor(0, 1, 2, 3, 4)})
    position.save(tmp_path / "position.json")
    assert json.loads((tmp_path / "position.json").read_text())["places"] == {"0": [0, 1, 2, 3, 4]}
    with pytest.raises(InputError, match=r"by 2 process\(es\) with 1 worker\(s\) .* not 1 with 3"):
        Position(1, 3).load(tmp_path / "position.json")
    with pytest.raises(InputError, match="must resume with the same number of processes"):
        Position(2, 1).load(tmp_path / "position_1.json")


@pytest.fixture(scope="module")
def gaps(text, tmp_path_factory):
    """The same documents with 13 records without text among them, in two files and in one."""
    _, documents, tokenizer = text
    folder = tmp_path_factory.mktemp("gaps")
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    for index in (0, 0, 5, 6, 7, 14, 21, 30, 30, 31, 44, 59, 60):
        lines[min(index, 59)] = '{"text": null}\n' + lines[min(index, 59)]
    lines[59] = "".join(sorted(lines[59].splitlines(keepends=True), reverse=True))  # A null at the end.
    (folder / "one.jsonl").write_text("".join(lines))
    (folder / "two").mkdir()
    (folder / "two/a.jsonl").write_text("".join(lines[:33]))
    (folder / "two/b.jsonl").write_text("".join(lines[33:]))
    return folder, documents, tokenizer


@pytest.mark.parametrize("sources", ["one.jsonl", "two"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_records_without_text_are_counted_once(gaps, sources, workers):
    """Whether each reader has files of its own or all read every file, and for any number of epochs."""
    folder, documents, tokenizer = gaps
    reader = stream(gaps, Position(1, workers), sources=[str(folder / sources)])
    for worker in range(workers):
        blocks = list(
            itertools.takewhile(lambda block: block[CURSOR][1] < 3, reader._read(worker, workers, worker))
        )
        reader.position.record(*blocks[-1][CURSOR].tolist())
    assert reader.num_skipped() == 13
    texts = documents_in(epochs_of(stream(gaps, sources=[str(folder / sources)]), 1), tokenizer)
    assert sorted(texts) == sorted(documents)


@pytest.mark.parametrize("sources", ["one.jsonl", "two"])
def test_resumed_stream_continues_counting_skipped_records(gaps, sources, tmp_path):
    source = [str(gaps[0] / sources)]
    cursors = [block[CURSOR].tolist() for block in epochs_of(stream(gaps, sources=source), 2)]
    for stop in range(0, len(cursors), 67):
        position = Position(1, 1)
        position.record(*cursors[stop])
        position.save(tmp_path / "position.json")
        restored = Position(1, 1)
        restored.load(tmp_path / "position.json")
        resumed = [block[CURSOR].tolist() for block in epochs_of(stream(gaps, restored, sources=source), 2)]
        assert resumed == cursors[stop + 1 :]
    assert cursors[0][-1] < cursors[-1][-1] == 13
