"""Reading documents: every format in every packing, separators, and one sentence for each mistake."""

import bz2
import gzip
import io
import json
import logging
import lzma
import random
import time

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from calm.data.files import find_files
from calm.data.formats import read_documents
from calm.data.options import ReadingOptions
from calm.data.sources import load_documents
from calm.errors import InputError

DOCUMENTS = ["The first document.\nIt has two lines.", "Größe 日本 🎈", "third"]
PLAIN = ReadingOptions()
DASHES = ReadingOptions(separator="---")
PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
}
compressed = pytest.mark.parametrize("packing", [packing for packing in PACKINGS if packing])


def as_txt(documents):
    return "\n---\n".join(documents).encode()


def as_jsonl(documents, field="text"):
    return "".join(json.dumps({"n": 1, field: document}) + "\n" for document in documents).encode()


def as_parquet(column, field="text"):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"n": list(range(len(column))), field: column}), buffer)
    return buffer.getvalue()


FORMATS = {".txt": as_txt, ".jsonl": as_jsonl, ".parquet": as_parquet}


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def load(tmp_path):
    def load(*sources, options=DASHES):
        documents = load_documents(
            [str(source) for source in sources], options, cache_dir=str(tmp_path / "cache")
        )
        assert documents.texts.column_names == ["text"]
        return list(documents.texts["text"])

    return load


@pytest.fixture
def offline(monkeypatch):
    """HF_HUB_OFFLINE is read when the libraries are imported, so it is set where they keep it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_in_every_packing(suffix, packing, write, load):
    path = write(f"some.text{suffix}{packing}", PACKINGS[packing](FORMATS[suffix](DOCUMENTS)))
    assert load(path) == DOCUMENTS


def test_a_folder_of_mixed_files(write, load):
    """Sorted by path, folders inside too; files of other kinds are passed by."""
    write("c.parquet", as_parquet(["c1", "c2"]))
    write("a/two.jsonl.gz", gzip.compress(as_jsonl(["a2"])))
    write("a/one.TXT", b"a1")
    write("b.jsonl", as_jsonl(["b1", "b2"]))
    write("a/picture.png", b"\x89PNG")
    folder = write("train.log", b"no").parent
    assert [file.name for file in find_files(folder)] == ["one.TXT", "two.jsonl.gz", "b.jsonl", "c.parquet"]
    assert load(folder) == ["a1", "a2", "b1", "b2", "c1", "c2"]


def test_sources_are_read_in_the_order_given(write, load):
    first, second = write("z.txt", b"z"), write("a.txt", b"a")
    assert load(first, second) == ["z", "a"]


def test_a_changed_file_is_read_again(write, load):
    assert load(write("a.txt", b"one")) == ["one"]
    assert load(write("a.txt", b"two")) == ["two"]


def test_other_field(write, load):
    options = ReadingOptions(text_field="story")
    jsonl, parquet = (
        write("a.jsonl", as_jsonl(["a"], "story")),
        write("b.parquet", as_parquet(["b"], "story")),
    )
    assert load(jsonl, parquet, options=options) == ["a", "b"]


def test_without_a_separator_a_file_is_one_document(write):
    path = write("a.txt", b"\none\n\n---\ntwo\n\n")
    assert list(read_documents(path, PLAIN)) == ["one\n\n---\ntwo"]


def test_separator_lines(write):
    """A separator is a whole line; blank documents are dropped; the text inside stays as it is."""
    path = write("a.txt", b"---\n  one\nx --- y\n\n--- \n\n \n---\ntwo\r\nlines\r\n---\r\n")
    assert list(read_documents(path, DASHES)) == ["  one\nx --- y", "two\r\nlines"]


def test_blank_line_as_separator(write):
    path = write("a.txt", b"one\ntwo\n\n\n \nthree\r\n\r\nfour")
    assert list(read_documents(path, ReadingOptions(separator=""))) == ["one\ntwo", "three", "four"]


def test_blank_lines_are_no_records_and_blank_texts_are_none(write):
    path = write("a.jsonl", b'{"text": "a"}\n\n{"text": " \\n"}\n{"text": ""}\n{"text": "b"}')
    assert list(read_documents(path, PLAIN)) == ["a", None, None, "b"]


def test_nulls_and_blanks_of_parquet_are_none(write):
    path = write("a.parquet", as_parquet(["a", None, " ", "", "b"]))
    assert list(read_documents(path, PLAIN)) == ["a", None, None, None, "b"]


@pytest.mark.parametrize(("name", "data"), [("a.txt", b"a"), ("a.jsonl", b'{"text": "a"}')])
def test_a_byte_order_mark_is_no_text(name, data, write):
    assert list(read_documents(write(name, b"\xef\xbb\xbf" + data), PLAIN)) == ["a"]


@compressed
def test_packed_files_put_one_after_another(packing, write):
    """`cat a.gz b.gz > c.gz` is a valid file of both."""
    pack = PACKINGS[packing]
    path = write(f"a.txt{packing}", pack(b"one\n---\n") + pack(b"two\n"))
    assert list(read_documents(path, DASHES)) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@compressed
def test_truncated_files(suffix, packing, write):
    """A download that broke off must not pass as a shorter text."""
    text = random.Random(0).randbytes(300_000).hex()
    packed = PACKINGS[packing](FORMATS[suffix]([text[i : i + 100] for i in range(0, len(text), 100)]))
    path = write(f"whole{suffix}{packing}", packed)
    assert len(list(read_documents(path, DASHES))) == 6000
    path = write(f"part{suffix}{packing}", packed[: len(packed) // 2])
    with pytest.raises(InputError, match=rf"part{suffix}{packing}.*damaged"):
        list(read_documents(path, DASHES))


@compressed
def test_files_that_are_not_what_their_name_says(packing, write):
    path = write(f"a.txt{packing}", b"This was never packed at all.")
    with pytest.raises(InputError, match=r"a\.txt.*damaged"):
        list(read_documents(path, PLAIN))


@pytest.mark.parametrize("data", [b"no parquet at all", as_parquet(["a"] * 100)[:200]])
def test_damaged_parquet(data, write):
    with pytest.raises(InputError, match=r"a\.parquet.*damaged"):
        list(read_documents(write("a.parquet", data), PLAIN))


def test_missing_file(load, tmp_path):
    with pytest.raises(InputError, match=r"no file or folder '.*nothing\.txt'"):
        load(tmp_path / "nothing.txt")


@pytest.mark.parametrize("data", [b"", b" \n\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_file(name, data, write, load):
    with pytest.raises(InputError, match=r"no text in .*a\."):
        load(write(name, data))


def test_an_empty_file_among_others_is_passed_by(write, load):
    assert load(write("a.txt", b""), write("b.txt", b"b")) == ["b"]


def test_a_folder_without_text_files(write, load):
    with pytest.raises(InputError, match=r"folder '.*' holds no \.txt, .*, \.jsonl, \.parquet file"):
        load(write("sub/picture.png", b"\x89PNG").parent)


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_not_utf_8(packing, write, load):
    """The line is named, also where the file is read inside a dataset builder."""
    path = write(f"a.txt{packing}", PACKINGS[packing]("one\ntwo\ncafé\n".encode("latin-1")))
    with pytest.raises(InputError, match=r"a\.txt.* is not UTF-8 \(line 3"):
        load(path)


def test_utf_16(write):
    with pytest.raises(InputError, match=r"is not UTF-8 \(line 1"):
        list(read_documents(write("a.txt", "one\n".encode("utf-16")), PLAIN))


@pytest.mark.parametrize("record", ['{"texts": "a"}', '{"text": null}', '{"text": " "}', "{}"])
def test_a_record_without_text_is_skipped_and_counted(record, write, load, caplog):
    path = write("a.jsonl", f'{{"text": "a"}}\n\n{record}\n'.encode())
    with caplog.at_level(logging.INFO):
        assert load(path) == ["a"]
    assert [record.getMessage() for record in caplog.records] == ["text: skipped 1 record without text"]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ('{"text": 3}', "has a number in its field 'text', not text"),
        ('{"text": ["a"]}', "has a list in its field 'text', not text"),
        ('{"text": {"a": "b"}}', "has an object in its field 'text', not text"),
        ('{"text": false}', "has true or false in its field 'text', not text"),
        ('["text"]', "is not a JSON object"),
        ('"text"', "is not a JSON object"),
    ],
)
def test_what_is_no_text_is_named_by_its_line(record, kind, write, load):
    path = write("a.jsonl", f'{{"text": "a"}}\n\n{record}\n'.encode())
    with pytest.raises(InputError, match=rf"a\.jsonl', line 3, {kind}"):
        load(path)


def test_a_field_that_no_line_has(write, load):
    path = write("a.jsonl", b'{"body": "a", "n": 1}\n{"body": "b"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl' has no field 'text'; its fields are body, n\. Name ano"):
        load(path)


@pytest.mark.parametrize("line", ['{"text": "b"', "text", '{"text": "b"} {"text": "c"}', "{'text': 'b'}"])
def test_broken_json_line(line, write, load):
    path = write("a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "c"}}\n'.encode())
    with pytest.raises(InputError, match=r"a\.jsonl', line 2, is not JSON"):
        load(path)


def test_json_with_half_a_character(write, load):
    r"""JSON may hold "\ud83d" alone, which is no Unicode text and cannot be stored or tokenized."""
    path = write("a.jsonl", b'{"text": "a"}\n{"text": "cut emoji \\ud83d"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl', line 2"):
        load(path)


def test_parquet_without_the_column(write, load):
    path = write("a.parquet", as_parquet(["a"], "body"))
    with pytest.raises(InputError, match=r"a\.parquet' has no field 'text'; its fields are n, body\. Name"):
        load(path)


@pytest.mark.parametrize("column", [[1, 2], [b"caf\xe9"], [["a"]]])
def test_parquet_with_a_column_that_is_no_text(column, write, load):
    path = write("a.parquet", as_parquet(column))
    with pytest.raises(InputError, match=r"a\.parquet.*text"):
        load(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "nobody/nothing:config"])
def test_a_hub_name_without_network_is_one_sentence(name, load, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(
        InputError, match=f"'{name}' is neither a local file or folder nor a dataset"
    ) as caught:
        load(name)
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)


def test_a_local_folder_goes_before_the_hub(write, load, tmp_path, monkeypatch):
    write("owner/name/a.txt", b"local")
    monkeypatch.chdir(tmp_path / "in")
    assert load("owner/name") == ["local"]
