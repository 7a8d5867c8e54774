"""Damaged text files give documents, or are refused in one sentence."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from fuzz_budget import BUDGET
from hypothesis import given
from hypothesis import strategies as st

from calm.data.formats import read_documents
from calm.data.options import ReadingOptions
from calm.data.records import load_records
from calm.errors import InputError

OPTIONS = ReadingOptions(separator="", max_document_mb=1)
TEXTS = ["One day, a dog ran.", "größer 日本 🎈\n\nagain", "", "x" * 300] * 5
COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
}


def _parquet(**options):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": TEXTS, "n": range(len(TEXTS))}), buffer, **options)
    return buffer.getvalue()


CONTENTS = {
    "a.txt": "\n\n".join(TEXTS).encode(),
    "a.jsonl": "".join(json.dumps({"text": text, "n": [1, {"a": None}]}) + "\n" for text in TEXTS).encode(),
    "a.parquet": _parquet(row_group_size=6),
    "b.parquet": _parquet(compression="zstd", use_dictionary=False, data_page_version="2.0"),
}
FILES = {
    name + extension: compress(content)
    for name, content in CONTENTS.items()
    for extension, compress in COMPRESSIONS.items()
}
INTERESTING = st.sampled_from(
    [b"", b"\0", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\n", b'"', b"{", b"[" * 2000, b"\\ud800",
     b"\xef\xbb\xbf", b"1e999", b"NaN", b"\r", b"\x1f\x8b", b"PAR1", b"-" * 40]
)  # fmt: skip


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Content with a few pieces replaced, cut out, doubled, or cut off at the end."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from([0, 0, 1, 1, 4, 50, 10**6])))
        replacement = draw(st.one_of(INTERESTING, st.binary(max_size=8), st.just(content[start:stop] * 2)))
        content = content[:start] + replacement + content[stop:]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("name", FILES)
@BUDGET
@given(data=st.data())
def test_damaged_files_are_read_or_refused(name, data, folder):
    path = folder / name
    path.write_bytes(data.draw(damaged(FILES[name])))
    for read in (lambda: read_documents(path, OPTIONS), lambda: load_records([str(path)])):
        try:
            for item in read():
                if isinstance(item, str):
                    item.encode()
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
