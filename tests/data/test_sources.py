"""Reading documents: every format in every compression, separators, and how mistakes are reported."""

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
COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
}
in_every_compression = pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name])


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


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_in_every_compression(suffix, compression, write, load):
    path = write(f"some.text{suffix}{compression}", COMPRESSIONS[compression](FORMATS[suffix](DOCUMENTS)))
    assert load(path) == DOCUMENTS


def test_folder_of_mixed_files_is_read_in_order(write, load):
    """Sorted by path, subfolders included; files of other formats are skipped."""
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


def test_text_field_can_be_chosen(write, load):
    options = ReadingOptions(text_field="story")
    jsonl, parquet = (
        write("a.jsonl", as_jsonl(["a"], "story")),
        write("b.parquet", as_parquet(["b"], "story")),
    )
    assert load(jsonl, parquet, options=options) == ["a", "b"]


def test_without_a_separator_a_file_is_one_document(write):
    path = write("a.txt", b"\none\n\n---\ntwo\n\n")
    assert list(read_documents(path, PLAIN)) == ["one\n\n---\ntwo"]


def test_separator_lines_divide_documents(write):
    """A separator is a whole line; blank documents are dropped; the text inside stays as it is."""
    path = write("a.txt", b"---\n  one\nx --- y\n\n--- \n\n \n---\ntwo\r\nlines\r\n---\r\n")
    assert list(read_documents(path, DASHES)) == ["  one\nx --- y", "two\r\nlines"]


def test_blank_line_can_be_the_separator(write):
    path = write("a.txt", b"one\ntwo\n\n\n \nthree\r\n\r\nfour")
    assert list(read_documents(path, ReadingOptions(separator=""))) == ["one\ntwo", "three", "four"]


def test_blank_lines_are_no_records_and_blank_texts_are_none(write):
    path = write("a.jsonl", b'{"text": "a"}\n\n{"text": " \\n"}\n{"text": ""}\n{"text": "b"}')
    assert list(read_documents(path, PLAIN)) == ["a", None, None, "b"]


def test_nulls_and_blanks_of_parquet_are_none(write):
    path = write("a.parquet", as_parquet(["a", None, " ", "", "b"]))
    assert list(read_documents(path, PLAIN)) == ["a", None, None, None, "b"]


@pytest.mark.parametrize(("name", "data"), [("a.txt", b"a"), ("a.jsonl", b'{"text": "a"}')])
def test_byte_order_mark_is_dropped(name, data, write):
    assert list(read_documents(write(name, b"\xef\xbb\xbf" + data), PLAIN)) == ["a"]


@in_every_compression
def test_concatenated_compressed_files_are_read_to_the_end(compression, write):
    """`cat a.gz b.gz > c.gz` is a valid file of both."""
    compress = COMPRESSIONS[compression]
    path = write(f"a.txt{compression}", compress(b"one\n---\n") + compress(b"two\n"))
    assert list(read_documents(path, DASHES)) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@in_every_compression
def test_truncated_files_are_refused(suffix, compression, write):
    """A download that broke off must not pass as a shorter text."""
    text = random.Random(0).randbytes(300_000).hex()
    documents = [text[i : i + 100] for i in range(0, len(text), 100)]
    compressed = COMPRESSIONS[compression](FORMATS[suffix](documents))
    path = write(f"whole{suffix}{compression}", compressed)
    assert len(list(read_documents(path, DASHES))) == 6000
    path = write(f"part{suffix}{compression}", compressed[: len(compressed) // 2])
    with pytest.raises(InputError, match=rf"part{suffix}{compression}.*damaged"):
        list(read_documents(path, DASHES))


@in_every_compression
def test_uncompressed_file_with_a_compressed_suffix_is_refused(compression, write):
    path = write(f"a.txt{compression}", b"This was never compressed at all.")
    with pytest.raises(InputError, match=r"a\.txt.*damaged"):
        list(read_documents(path, PLAIN))


@pytest.mark.parametrize("data", [b"no parquet at all", as_parquet(["a"] * 100)[:200]])
def test_damaged_parquet_is_refused(data, write):
    with pytest.raises(InputError, match=r"a\.parquet.*damaged"):
        list(read_documents(write("a.parquet", data), PLAIN))


def test_missing_file_is_refused(load, tmp_path):
    with pytest.raises(InputError, match=r"no file or folder '.*nothing\.txt'"):
        load(tmp_path / "nothing.txt")


@pytest.mark.parametrize("data", [b"", b" \n\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_file_is_refused(name, data, write, load):
    with pytest.raises(InputError, match=r"no text in .*a\."):
        load(write(name, data))


def test_empty_file_among_others_is_skipped(write, load):
    assert load(write("a.txt", b""), write("b.txt", b"b")) == ["b"]


def test_folder_without_text_files_is_refused(write, load):
    with pytest.raises(InputError, match=r"folder '.*' holds no \.txt, .*, \.jsonl, \.parquet file"):
        load(write("sub/picture.png", b"\x89PNG").parent)


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_invalid_utf8_is_named_by_its_line(compression, write, load):
    """The line is named even if a dataset builder reads the file."""
    path = write(f"a.txt{compression}", COMPRESSIONS[compression]("one\ntwo\ncafé\n".encode("latin-1")))
    with pytest.raises(InputError, match=r"a\.txt.* is not UTF-8 \(line 3"):
        load(path)


def test_utf16_is_refused(write):
    with pytest.raises(InputError, match=r"is not UTF-8 \(line 1"):
        list(read_documents(write("a.txt", "one\n".encode("utf-16")), PLAIN))


@pytest.mark.parametrize("record", ['{"texts": "a"}', '{"text": null}', '{"text": " "}', "{}"])
def test_a_record_without_text_is_skipped_and_counted(record, write, load, caplog):
    path = write("a.jsonl", f'{{"text": "a"}}\n\n{record}\n'.encode())
    with caplog.at_level(logging.INFO):
        assert load(path) == ["a"]
    assert [record.getMessage() for record in caplog.records] == ["text: skipped 1 record without text"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"text": 3}', "has a number in its field 'text', not text"),
        ('{"text": ["a"]}', "has a list in its field 'text', not text"),
        ('{"text": {"a": "b"}}', "has an object in its field 'text', not text"),
        ('{"text": false}', "has true or false in its field 'text', not text"),
        ('["text"]', "is not a JSON object"),
        ('"text"', "is not a JSON object"),
    ],
)
def test_records_without_proper_text_are_named_by_their_line(record, message, write, load):
    path = write("a.jsonl", f'{{"text": "a"}}\n\n{record}\n'.encode())
    with pytest.raises(InputError, match=rf"a\.jsonl', line 3, {message}"):
        load(path)


def test_field_that_no_record_has_is_refused(write, load):
    path = write("a.jsonl", b'{"body": "a", "n": 1}\n{"body": "b"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl' has no field 'text'; its fields are body, n\. Name ano"):
        load(path)


@pytest.mark.parametrize("line", ['{"text": "b"', "text", '{"text": "b"} {"text": "c"}', "{'text': 'b'}"])
def test_broken_json_is_named_by_its_line(line, write, load):
    path = write("a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "c"}}\n'.encode())
    with pytest.raises(InputError, match=r"a\.jsonl', line 2, is not JSON"):
        load(path)


def test_unpaired_surrogate_in_json_is_refused(write, load):
    r"""JSON may hold "\ud83d" alone, which is no Unicode text and cannot be stored or tokenized."""
    path = write("a.jsonl", b'{"text": "a"}\n{"text": "cut emoji \\ud83d"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl', line 2"):
        load(path)


def test_missing_column_of_parquet_is_refused(write, load):
    path = write("a.parquet", as_parquet(["a"], "body"))
    with pytest.raises(InputError, match=r"a\.parquet' has no field 'text'; its fields are n, body\. Name"):
        load(path)


@pytest.mark.parametrize("column", [[1, 2], [b"caf\xe9"], [["a"]]])
def test_column_of_parquet_without_text_is_refused(column, write, load):
    path = write("a.parquet", as_parquet(column))
    with pytest.raises(InputError, match=r"a\.parquet.*text"):
        load(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "nobody/nothing:config"])
def test_hub_name_without_network_fails_in_one_sentence(name, load, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(
        InputError, match=f"'{name}' is neither a local file or folder nor a dataset"
    ) as caught:
        load(name)
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)


def test_local_folder_takes_precedence_over_the_hub(write, load, tmp_path, monkeypatch):
    write("owner/name/a.txt", b"local")
    monkeypatch.chdir(tmp_path / "in")
    assert load("owner/name") == ["local"]
