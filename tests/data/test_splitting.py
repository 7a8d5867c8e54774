"""The held-out split: the requested share, whole paragraphs only, and the same text in a stream."""

import itertools
import json
import logging

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.data.options import ReadingOptions
from calm.data.pieces import rank_of, ranks_of
from calm.data.prepare import prepare
from calm.data.prepared import load_prepared, split_of
from calm.data.splitting import choose_split
from calm.data.stories import stories
from calm.data.streaming import CURSOR, BlockStream, Position, StreamSettings
from calm.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def text_of(seed, number, blank="\n\n"):
    return blank.join(stories(seed, number))


def as_jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def prepared(tmp_path, files, name="out", **settings):
    folder = tmp_path / "text"
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        (folder / file).write_text(content, newline="")
    return prepare([str(folder)], tmp_path / name, **({"vocab_size": 300, "num_proc": 1} | settings))


def texts_of(data, split):
    return data.tokenizer.batch_decode(list(getattr(data, split)["input_ids"]), skip_special_tokens=True)


def split_for(documents, fraction, seed=0):
    dataset = datasets.Dataset.from_dict({"text": documents})
    return choose_split(dataset, ranks_of(dataset, seed), fraction, seed, ["x.txt"])


LONG_TEXTS = {
    "three files": {f"{number}.txt": text_of(number, 150) for number in range(3)},
    "one file": {"a.txt": text_of(1, 250)},
    "CRLF": {"a.txt": text_of(1, 250, "\r\n\r\n")},
    "no blank lines": {"a.txt": text_of(1, 250, "\n")},
    "one line": {"a.txt": text_of(1, 250, " ")},
    "one word": {"a.txt": "".join(text_of(1, 250, "").split()).replace(".", "").replace("!", "")},
    "one huge record and small ones": {
        "a.jsonl": as_jsonl([*stories(5, 40), text_of(1, 250), *stories(6, 40)])
    },
    "one huge and many small": {"a.txt": text_of(1, 150), "b.jsonl": as_jsonl(stories(5, 150))},
    "the same file twice": {"a.txt": text_of(1, 150), "b.txt": text_of(1, 150), "c.txt": text_of(2, 150)},
}


@pytest.mark.parametrize("files", LONG_TEXTS.values(), ids=LONG_TEXTS)
@pytest.mark.parametrize("seed", [1])
def test_held_out_share_is_close_to_the_requested_share(files, seed, tmp_path):
    data = prepared(tmp_path, files, seed=seed)
    assert data.counts().share == pytest.approx(0.02, rel=0.25)
    train, held_out = texts_of(data, "train"), texts_of(data, "validation")
    assert not set(train) & set(held_out)
    num_characters = sum(len(file) if name.endswith(".txt") else 0 for name, file in files.items())
    num_characters += sum(
        len(json.loads(line)["text"])
        for name, file in files.items()
        if name.endswith(".jsonl")
        for line in file.splitlines()
    )
    assert len("".join(train + held_out)) == num_characters


def test_both_sides_in_order_give_back_the_text(tmp_path):
    data = prepared(tmp_path, LONG_TEXTS["one file"])
    split = split_of(tmp_path / "out")
    runs = list(split.runs(LONG_TEXTS["one file"]["a.txt"]))
    assert "".join(text for _, text in runs) == LONG_TEXTS["one file"]["a.txt"]
    assert [text for is_held_out, text in runs if is_held_out] == texts_of(data, "validation")
    assert [text for is_held_out, text in runs if not is_held_out] == texts_of(data, "train")
    sides = [is_held_out for is_held_out, _ in runs]
    assert all(a != b for a, b in itertools.pairwise(sides))  # Adjacent parts on one side are one document.


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.lists(st.integers(20, 1500), min_size=1, max_size=80), min_size=1, max_size=6),
    st.floats(0.01, 0.5),
    st.integers(0, 3),
)
def test_no_paragraph_is_on_both_sides_and_none_is_lost(documents, fraction, seed):
    numbers = itertools.count()
    paragraphs = [[f"{next(numbers)} ".ljust(length, "x") for length in document] for document in documents]
    texts = ["\n\n".join(document) for document in paragraphs]
    if len(texts) == 1 and len(paragraphs[0]) == 1:
        return
    split = split_for(texts, fraction, seed)
    sides = {True: [], False: []}
    for text in texts:
        runs = list(split.runs(text))
        assert "".join(run for _, run in runs) == text
        for is_held_out, run in runs:
            sides[is_held_out] += run.strip().split("\n\n")
    assert sides[True] and sides[False]
    everything = [paragraph for document in paragraphs for paragraph in document]
    assert sorted(sides[True] + sides[False]) == sorted(everything)


@pytest.mark.parametrize(
    ("number", "fraction"), [(1000, 0.02), (200, 0.1), (40, 0.1), (30, 0.02), (12, 0.001)]
)
def test_short_documents_are_split_by_count(number, fraction):
    """Those of lowest rank are held out, as in earlier versions, which split only by document."""
    documents = list(dict.fromkeys(stories(3, number)))
    split = split_for(documents, fraction, seed=7)
    ranks = sorted(rank_of(document, 7) for document in documents)
    assert split.part_bytes is None
    assert split.highest == ranks[max(1, round(fraction * len(documents))) - 1]


def test_only_the_long_documents_are_cut(tmp_path):
    long = text_of(1, 300)
    split = split_for([long, *stories(2, 20), long], 0.05)
    assert split.part_bytes is not None
    small = [run for document in stories(2, 20) for run in split.runs(document)]
    assert len(small) == 20
    assert sum(is_held_out for is_held_out, _ in split.runs(long)) > 1


def test_paragraph_longer_than_the_held_out_share_is_trained_on():
    blob = "x" * 100_000
    for seed in range(8):
        split = split_for([f"{text_of(1, 300)}\n\n{blob}\n\n{text_of(2, 300)}"], 0.02, seed)
        runs = list(split.runs(f"{text_of(1, 300)}\n\n{blob}\n\n{text_of(2, 300)}"))
        held_out = [run for is_held_out, run in runs if is_held_out]
        assert not any(blob in run for run in held_out)
        assert sum(map(len, held_out)) == pytest.approx(0.02 * sum(len(run) for _, run in runs), rel=0.25)


def test_paragraphs_longer_than_a_part_are_not_cut():
    paragraphs = [" ".join(stories(seed, 12)) for seed in range(60)]  # About 7500 characters each.
    text = "\n\n".join(paragraphs)
    split = split_for([text], 0.02)
    held_out = [run for is_held_out, run in split.runs(text) if is_held_out]
    assert {paragraph for run in held_out for paragraph in run.strip().split("\n\n")} <= set(paragraphs)
    assert sum(map(len, held_out)) == pytest.approx(0.02 * len(text), rel=0.25)


@pytest.mark.parametrize(
    "documents", [["one"], ["the same"] * 3, ["one line. Two sentences."], ["again\n\nagain\n\nagain\n\n"]]
)
def test_text_without_two_different_paragraphs_is_refused(documents):
    with pytest.raises(InputError, match=r"x\.txt holds a single document without two different paragraphs"):
        split_for(documents, 0.02)


def test_short_text_is_split_between_lines(tmp_path):
    data = prepared(tmp_path, {"a.txt": "first line\nsecond line\nthird line"})
    assert len(data.train) and len(data.validation)
    lines = "".join(text + "\n" for text in texts_of(data, "train") + texts_of(data, "validation")).split(
        "\n"
    )
    assert sorted(line for line in lines if line) == ["first line", "second line", "third line"]


def streamed(folder, tokenizer, split):
    """The documents of a stream's first epoch."""
    reader = BlockStream(
        StreamSettings(sources=[str(folder)], options=ReadingOptions(), chunk_size=4, block_size=64, window=5,
                       held_out_below=split.highest, held_out_seed=split.seed, part_bytes=split.part_bytes),
        tokenizer, Position(1, 1),
    )  # fmt: skip
    blocks = list(itertools.takewhile(lambda block: block[CURSOR][1] < 1, reader))
    tokens = np.concatenate([block["labels"].numpy() for block in blocks])
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    parts = np.split(tokens, ends + 1)[:-1]
    return [tokenizer.decode(part[part >= 0], skip_special_tokens=True) for part in parts]


@pytest.mark.parametrize(
    "name", ["three files", "one line", "one huge and many small", "the same file twice"]
)
def test_stream_reads_exactly_the_training_text(name, tmp_path):
    data = prepared(tmp_path, LONG_TEXTS[name])
    split = split_of(tmp_path / "out")
    assert split.part_bytes is not None
    assert sorted(streamed(tmp_path / "text", data.tokenizer, split)) == sorted(texts_of(data, "train"))


def test_text_outside_the_sample_is_cut_the_same_way(tmp_path):
    files = {f"{n}.jsonl": as_jsonl(text_of(10 * n + m, 60) for m in range(4)) for n in range(3)}
    data = prepared(tmp_path, files, max_documents=1)
    split = split_of(tmp_path / "out")
    texts = [text_of(10 * n + m, 60) for n in range(3) for m in range(4)]
    runs = [run for text in texts for run in split.runs(text)]
    streamed_texts = streamed(tmp_path / "text", data.tokenizer, split)
    assert sorted(streamed_texts) == sorted(run for is_held_out, run in runs if not is_held_out)
    held_out = sum(len(run) for is_held_out, run in runs if is_held_out)
    assert 0.005 < held_out / sum(map(len, texts)) < 0.05


def test_stream_of_parts_resumes_exactly_where_it_stopped(tmp_path):
    data = prepared(tmp_path, LONG_TEXTS["three files"])
    split = split_of(tmp_path / "out")

    def stream(position):
        return BlockStream(
            StreamSettings(
                sources=[str(tmp_path / "text")], options=ReadingOptions(), chunk_size=4, block_size=64,
                window=2, held_out_below=split.highest, part_bytes=split.part_bytes,
            ),
            data.tokenizer, position,
        )  # fmt: skip

    blocks = list(itertools.islice(stream(Position(1, 1)), 2000))
    assert max(int(block[CURSOR][3]) for block in blocks) > 1  # Documents that are cut count singly.
    for stop in (1, 800, 1700):
        position = Position(1, 1)
        position.record(*blocks[stop - 1][CURSOR].tolist())
        resumed = list(itertools.islice(stream(position), 50))
        assert all(
            (a["input_ids"] == b["input_ids"]).all() for a, b in zip(resumed, blocks[stop:], strict=False)
        )


def test_folder_of_an_earlier_version_still_opens(tmp_path, caplog):
    prepared(tmp_path, {"a.jsonl": as_jsonl(stories(0, 50))})
    path = tmp_path / "out/prepared.json"
    info = json.loads(path.read_text())
    for name in ("tokens", "validation_fraction", "part_bytes", "sample_documents"):
        del info[name]
    name = "train/data-00000-of-00001.arrow"
    info["bytes"] = {name: (tmp_path / "out" / name).stat().st_size}
    (tmp_path / "out/checksums.json").unlink()
    path.write_text(json.dumps(info))
    assert load_prepared(tmp_path / "out").counts().documents == info["documents"]
    assert split_of(tmp_path / "out").part_bytes is None


def logged_messages(caplog):
    return [
        (record.levelname, record.getMessage()) for record in caplog.records if record.name.startswith("calm")
    ]


def test_sizes_of_both_sides_are_logged_and_recorded(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        data = prepared(tmp_path, LONG_TEXTS["three files"])
    counts = data.counts()
    info = json.loads((tmp_path / "out/prepared.json").read_text())
    assert (
        info["documents"]
        == {"train": len(data.train), "validation": len(data.validation)}
        == counts.documents
    )
    tokens = {split: sum(map(len, getattr(data, split)["input_ids"])) for split in ("train", "validation")}
    assert info["tokens"] == tokens == counts.tokens
    assert info["validation_fraction"] == 0.02
    [(_, cut), (_, parts)] = logged_messages(caplog)
    assert cut.startswith("text: cut 3 long documents (between paragraphs")
    share = 100 * tokens["validation"] / sum(tokens.values())
    assert parts == (
        f"text: {len(data.train)} documents and {tokens['train']:,} tokens to train on; "
        f"{len(data.validation)} documents and {tokens['validation']:,} tokens ({share:.1f}%) held out"
    )


def test_share_far_from_the_requested_one_is_warned_about(tmp_path, caplog):
    prepared(tmp_path, {"a.txt": text_of(1, 6)})
    far, few = [message for level, message in logged_messages(caplog) if level == "WARNING"]
    assert "% of the text is held out, not the 2.0% asked for" in far
    assert all(
        option in far
        for option in ("--separator", "--validation ", "--validation_fraction", "data.separator")
    )
    assert "tokens held out are too few for a reliable score (at least 3,000 are needed)" in few


def test_given_held_out_text_is_not_compared_with_a_share(tmp_path, caplog):
    (tmp_path / "other.jsonl").write_text(as_jsonl(stories(9, 60)))
    with caplog.at_level(logging.INFO):
        prepared(tmp_path, {"a.txt": text_of(1, 60)}, validation_sources=[str(tmp_path / "other.jsonl")])
    [(level, message)] = logged_messages(caplog)
    assert level == "INFO" and message.startswith("text: 1 document and ") and "60 documents and" in message


def test_sample_of_a_stream_is_logged_as_a_sample(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        prepared(tmp_path, {"a.jsonl": as_jsonl(stories(0, 500))}, max_documents=300)
    assert logged_messages(caplog)[0][1].startswith("text (a sample of what is streamed): 294 documents and ")
