"""Documents that are too long for memory, or are not text, are refused."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from calm.data.formats import read_documents
from calm.data.reading import ReadingOptions, numbered_lines, open_parquet
from calm.data.records import load_records
from calm.errors import InputError

SMALL = ReadingOptions(max_document_mb=1)
LONG = b"x" * 1_000_001
MANY = b"line\n" * 200_001


def parquet(path, column, name="text", **options):
    pyarrow.parquet.write_table(pa.table({name: column}), path, **options)
    return path


TOO_LONG = {
    "a line of text": (
        "a.txt",
        LONG,
        r"line 1 of '.*a\.txt' is longer than 1 MB; split it, or raise --max",
    ),
    "a packed line": ("a.txt.gz", gzip.compress(LONG), "line 1 of"),
    "a record": ("a.jsonl", b'{"text": "a"}\n' + json.dumps({"text": LONG.decode()}).encode(), "line 2 of"),
    "a document of many lines": ("a.txt", MANY, "the document in .* that includes line 200001"),
    "blank lines": ("a.txt", b"\n" * 1_000_001, "that includes line"),
}


@pytest.mark.parametrize(("name", "content", "message"), TOO_LONG.values(), ids=TOO_LONG)
def test_too_long_text_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents(tmp_path / name, SMALL))


def test_longest_allowed_text_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(LONG[:-2] + b"\n")
    assert list(read_documents(tmp_path / "a.txt", SMALL)) == [LONG[:-2].decode()]
    (tmp_path / "b.txt").write_bytes(b"---\n".join([MANY[:-10]] * 3))
    assert (
        len(list(read_documents(tmp_path / "b.txt", ReadingOptions(max_document_mb=1, separator="---")))) == 3
    )
    lines = numbered_lines(tmp_path / "a.txt", 999_999), numbered_lines(tmp_path / "a.txt", 10**6)
    with pytest.raises(InputError, match="longer"):
        next(lines[0])
    assert len(next(lines[1])[1]) == 10**6


def test_too_long_documents_in_parquet_are_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", ["short", LONG.decode(), None, "last"])
    documents = read_documents(path, SMALL)
    assert next(documents) == "short"
    with pytest.raises(InputError, match=r"a document of '.*a\.parquet' is longer than 1 MB"):
        next(documents)
    assert list(read_documents(path, ReadingOptions(max_document_mb=2))) == [
        "short",
        LONG.decode(),
        None,
        "last",
    ]
    packed = tmp_path / "b.parquet.gz"
    unpacked = parquet(tmp_path / "c.parquet", [os.urandom(900_000).hex()])
    packed.write_bytes(gzip.compress(unpacked.read_bytes()))
    with pytest.raises(
        InputError, match=r"'.*b\.parquet\.gz', decompressed, is longer .*decompress it on disk"
    ):
        list(read_documents(packed, SMALL))
    with open_parquet(packed, 10**7) as table:
        assert table.metadata.num_rows == 1


INVALID_UTF8 = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
COLUMNS = {
    "numbers": (pa.array([1, 2]), "is int64, not text"),
    "bytes": (pa.array([b"a"]), "is binary, not text"),
    "lists": (pa.array([["a"]]), "is list<.*>, not text"),
    "structs": (pa.array([{"a": "b"}]), "is struct<.*>, not text"),
    "another": (None, "has no field 'text'; its fields are other"),
    "no UTF-8": (pa.Array.from_buffers(pa.string(), 1, INVALID_UTF8), "is not UTF-8"),
}


@pytest.mark.parametrize(("column", "message"), COLUMNS.values(), ids=COLUMNS)
def test_parquet_columns_without_text_are_refused(column, message, tmp_path):
    column, name = (["a"], "other") if column is None else (column, "text")
    path = parquet(tmp_path / "a.parquet", column, name)
    with pytest.raises(InputError, match=message):
        list(read_documents(path, SMALL))


def test_column_of_nulls_gives_records_without_text(tmp_path):
    assert list(read_documents(parquet(tmp_path / "a.parquet", pa.nulls(2)), SMALL)) == [None, None]


def test_records_that_are_not_utf8_are_refused(tmp_path):
    parquet(tmp_path / "a.parquet", COLUMNS["no UTF-8"][0])
    with pytest.raises(InputError, match="is not UTF-8"):
        list(load_records([str(tmp_path / "a.parquet")]))


@pytest.mark.parametrize("options", [{"use_dictionary": True}, {"compression": "gzip", "version": "1.0"}, {}])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_all_parquet_encodings_give_the_same_text(options, kind, tmp_path):
    texts = ["one", "two", "one", "größer"] * 100
    path = parquet(tmp_path / "a.parquet", pa.array(texts, kind), row_group_size=7, **options)
    assert list(read_documents(path, SMALL)) == texts


def test_columns_of_the_same_name_are_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has several columns 'text'"):
        list(read_documents(tmp_path / "a.parquet", SMALL))
    with pytest.raises(InputError, match="has columns of the same name"):
        list(load_records([str(tmp_path / "a.parquet")]))
