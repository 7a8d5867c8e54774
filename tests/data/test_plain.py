"""Files whose names tell no format: plain text is read, anything else is refused."""

import gzip
import io
import zipfile

import pytest

from calm.data.files import find_files
from calm.data.formats import read_documents
from calm.data.options import ReadingOptions
from calm.errors import InputError


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a" * 1000)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.py", "LICENSE", "a.log", "a.html", "a.b.c", "a.txt.orig", "a.yaml"])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_file_of_unknown_format_is_read_as_plain_text_if_named(name, compression, tmp_path):
    file = tmp_path / f"{name}{compression}"
    content = "größer 日本\n---\nagain\n".encode()
    file.write_bytes(gzip.compress(content) if compression else content)
    assert find_files(file) == [file]
    assert list(read_documents(file, ReadingOptions(separator="---"))) == ["größer 日本", "again"]


def test_character_may_straddle_the_end_of_the_checked_bytes(tmp_path):
    (tmp_path / "a.py").write_text("#" * (2**16 - 1) + "é" * 10, encoding="utf-8")
    assert find_files(tmp_path / "a.py") == [tmp_path / "a.py"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
        ("a.bin", b"text\0text"),
        ("a.txt.zip", zipped()),
        ("a.gz", b"This was never compressed."),
        ("a.gz.gz", gzip.compress(gzip.compress(b"a", mtime=0), mtime=0)),
        ("a.latin", "café".encode("latin-1")),
        ("utf16", "one\n".encode("utf-16")),
    ],
)
def test_files_that_are_not_plain_text_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"not UTF-8 plain text, and its name does not end in \.txt, .*\.xz"):
        find_files(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "A.JSON.gz", "a.csv", "a.tsv", "a.arrow"])
def test_records_in_unsupported_formats_are_not_read_as_text(name, tmp_path):
    (tmp_path / name).write_bytes(b'[{"text": "a"}]')
    with pytest.raises(InputError, match=r"holds records; convert it to \.jsonl or \.parquet first"):
        find_files(tmp_path / name)


def test_folder_reads_prose_and_counts_the_rest_by_suffix(tmp_path, caplog):
    read = ["a.txt", "b.md", "c.markdown.gz", "d.RST", "e.text", "f.adoc", "g.org", "h.tex"]
    others = ["a.py", "b.py", "c.py.gz", "d.json", "e.json", "f.log", "g.png", "h.x.y", "i", "j.a b", "k.pdf"]
    for name in (*read, *others):
        (tmp_path / name).write_bytes(b"a")
    with caplog.at_level("INFO"):
        assert [file.name for file in find_files(tmp_path, log_excluded=True)] == read
    [message] = [record.getMessage() for record in caplog.records]
    counts = "other formats (11: .py 3, .json 2, without a suffix 2, .log 1, .png 1, others 2)"
    assert message == f"read 8 files of '{tmp_path}'; left out: {counts}"
