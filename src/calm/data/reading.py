"""What text, JSON lines and parquet files hold, compressed or not: documents, and records with their places.

`calm.data.formats` says which file is read by which of these.
"""

import contextlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from calm.data.compression import COMPRESSIONS, open_file
from calm.errors import InputError, reason_of

_DOCUMENTS_AT_ONCE = 100
_RECORDS_AT_ONCE = 1000
# What the libraries raise for files that are damaged or something else than they say.
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How documents are found in what is read.

    Args:
        text_field: Field of the text in JSON lines, parquet files and hub datasets.
        separator: A line that parts the documents of a .txt file ("" for a blank line); None if
            each file is one document.
        max_document_mb: Longest document or line, and longest parquet file that is compressed, in MB (10^6
            bytes): they are read into memory whole.
    """

    text_field: str = "text"
    separator: str | None = None
    max_document_mb: int = 1000

    @property
    def most_bytes(self) -> int:
        """Bytes of a document at most."""
        return self.max_document_mb * 10**6


def numbered_lines(path: Path, most_bytes: int = ReadingOptions().most_bytes) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends.

    Raises:
        InputError: If a line is longer than `most_bytes`, or not UTF-8.
    """
    with open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(most_bytes + 1), b""), 1):
            if len(line) > most_bytes:
                raise _too_long(f"line {number} of '{path}'", most_bytes)
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"'{path}' is not UTF-8 (line {number}: {error.reason}); convert it to UTF-8 first."
                ) from None


def documents_of_text(path: Path, options: ReadingOptions) -> Iterator[str]:
    """The documents of a text file: the whole of it, or what lies between separators.

    Raises:
        InputError: If it is not UTF-8, or a document is too long.
    """
    lines: list[str] = []
    room = options.most_bytes
    for number, line in numbered_lines(path, options.most_bytes):
        if options.separator is not None and line.strip() == options.separator.strip():
            yield "".join(lines).strip("\r\n")
            lines, room = [], options.most_bytes
        else:
            lines.append(line)
            room -= len(line)  # Of characters, which are bytes or more.
            if room < 0:
                raise _too_long(f"the document of '{path}' that goes on in line {number}", options.most_bytes)
    yield "".join(lines).strip("\r\n")


def _json_lines(path: Path, most_bytes: int = ReadingOptions().most_bytes) -> Iterator[tuple[int, Any]]:
    """What each line that is not blank holds, with its number.

    Raises:
        InputError: As `numbered_lines`, or if a line is not JSON.
    """
    for number, line in numbered_lines(path, most_bytes):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"'{path}', line {number}, is not JSON ({reason_of(error)}); mend that line."
            ) from None
        yield number, value


def documents_of_json_lines(path: Path, options: ReadingOptions) -> Iterator[str]:
    """The field of the text of each line.

    Raises:
        InputError: If a line is not JSON, has no such field, or is too long.
    """
    for number, record in _json_lines(path, options.most_bytes):
        text = record.get(options.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(
                f"'{path}', line {number}, has no text in a field '{options.text_field}'; "
                "mend that line or name another field."
            )
        if _has_half_a_pair(text):
            raise InputError(
                f"'{path}', line {number}, has half a surrogate pair in its text; mend that line."
            )
        yield text


def records_of_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each record of JSON lines stands, and the record.

    Raises:
        InputError: If a line is not JSON, or no object.
    """
    for number, record in _json_lines(path):
        if not isinstance(record, dict):
            raise InputError(f"'{path}', line {number}, is no record ({{...}}); mend that line.")
        if _has_half_a_pair(json.dumps(record, ensure_ascii=False)):
            raise InputError(f"'{path}', line {number}, has half a surrogate pair in a text; mend that line.")
        yield f"'{path}', line {number}", record


def _has_half_a_pair(text: str) -> bool:
    """Whether a text holds half a surrogate pair, which JSON can name and UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def documents_of_parquet(path: Path, options: ReadingOptions) -> Iterator[str]:
    """The column of the text of a parquet file, without rows in which it is null or empty.

    Raises:
        InputError: If there is no such column, it holds no text, or a document is too long.
    """
    with open_parquet(path, options.most_bytes) as table:
        if options.text_field not in table.schema_arrow.names:
            raise InputError(
                f"'{path}' has no column '{options.text_field}'; "
                f"its columns are {', '.join(table.schema_arrow.names)}."
            )
        if table.schema_arrow.names.count(options.text_field) > 1:
            raise InputError(f"'{path}' has several columns '{options.text_field}'; rename all but one.")
        column = table.schema_arrow.field(options.text_field).type
        if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
            raise InputError(f"the column '{options.text_field}' of '{path}' is {column}, not text.")
        for batch in table.iter_batches(batch_size=_DOCUMENTS_AT_ONCE, columns=[options.text_field]):
            for text in batch.column(0):
                if text.is_valid and (size := text.as_buffer().size):
                    if size > options.most_bytes:
                        raise _too_long(f"a document of '{path}'", options.most_bytes)
                    yield _decoded(text, path)


def records_of_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a parquet file stands, and the row.

    Raises:
        InputError: If columns have the same name, or a text is not UTF-8.
    """
    with open_parquet(path) as table:
        number = 0
        for batch in table.iter_batches(batch_size=_RECORDS_AT_ONCE):
            if len(set(batch.schema.names)) < len(batch.schema.names):
                raise InputError(f"'{path}' has columns of the same name; rename all but one.")
            try:
                records = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise InputError(f"'{path}' is not UTF-8 ({error.reason}); convert it first.") from None
            for record in records:
                yield f"'{path}', row {number}", record
                number += 1


def _decoded(text: pyarrow.Scalar, path: Path) -> str:
    try:
        return text.as_py()
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 ({error.reason}); convert it to UTF-8 first.") from None


@contextlib.contextmanager
def open_parquet(
    path: Path, most_bytes: int = ReadingOptions().most_bytes
) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A parquet file; one that is compressed is decompressed in memory.

    Raises:
        InputError: If it is compressed, and decompresses to more than `most_bytes`.
    """
    with open_file(path) as file:
        if path.suffix.lower() not in COMPRESSIONS:
            yield pyarrow.parquet.ParquetFile(file)
            return
        content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise _too_long(f"'{path}', unpacked,", most_bytes, "unpack it on the disk")
        yield pyarrow.parquet.ParquetFile(io.BytesIO(content))


def _too_long(what: str, most_bytes: int, instead: str = "part it") -> InputError:
    return InputError(
        f"{what} is longer than {most_bytes // 10**6} MB; {instead}, or raise --max_document_mb (in a "
        "recipe: data.max_document_mb)."
    )
