"""Readers of text, JSON Lines and Parquet files, compressed or not: documents, and records with locations.

`calm.data.formats` says which reader is used for which file. A record without text is yielded as None, so
that callers can count such records.
"""

import contextlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from calm.data.compression import COMPRESSIONS, open_file
from calm.data.options import ReadingOptions, is_text, no_such_field, text_of, too_long
from calm.errors import InputError, reason_of

_DOCUMENTS_AT_ONCE = 100
_RECORDS_AT_ONCE = 1000
# What the libraries raise for files that are damaged or not of the format their name suggests.
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)


def numbered_lines(path: Path, most_bytes: int = ReadingOptions().most_bytes) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file, line ends included, numbered from 1.

    Raises:
        InputError: If a line is longer than `most_bytes`, or not UTF-8.
    """
    with open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(most_bytes + 1), b""), 1):
            if len(line) > most_bytes:
                raise too_long(f"line {number} of '{path}'", most_bytes)
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"'{path}' is not UTF-8 (line {number}: {error.reason}); convert it to UTF-8 first."
                ) from None


def documents_of_text(path: Path, options: ReadingOptions) -> Iterator[str]:
    """Yield the documents of a text file: the whole file, or the parts between separator lines.

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
            room -= len(line)  # Characters, a lower bound on the bytes.
            if room < 0:
                raise too_long(f"the document in '{path}' that includes line {number}", options.most_bytes)
    yield "".join(lines).strip("\r\n")


def _json_lines(path: Path, most_bytes: int = ReadingOptions().most_bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and the JSON value of each line that is not blank.

    Raises:
        InputError: As for `numbered_lines`, or if a line is not JSON.
    """
    for number, line in numbered_lines(path, most_bytes):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"'{path}', line {number}, is not JSON ({reason_of(error)}); fix that line."
            ) from None
        yield number, value


def documents_of_json_lines(path: Path, options: ReadingOptions) -> Iterator[str | None]:
    """Yield the text of each line; None for a line without text.

    Raises:
        InputError: If a line is not a record, its text is too long or not a string, or a field is in no line.
    """
    missing, fields = list(options.text_fields), list[str]()
    for number, record in _json_lines(path, options.most_bytes):
        where = f"'{path}', line {number}"
        if not isinstance(record, dict):
            raise _not_a_record(where)
        fields = fields or list(record)
        missing = [name for name in missing if name not in record]
        yield text_of(record, options, where)
    if missing and fields:
        raise no_such_field(f"'{path}'", missing[0], fields)


def records_of_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location of each record of a JSON Lines file, and the record.

    Raises:
        InputError: If a line is not a JSON object, or a text has an unpaired surrogate.
    """
    for number, record in _json_lines(path):
        if not isinstance(record, dict):
            raise _not_a_record(f"'{path}', line {number}")
        if _has_lone_surrogate(json.dumps(record, ensure_ascii=False)):
            raise InputError(f"'{path}', line {number}, has an unpaired surrogate in a text; fix that line.")
        yield f"'{path}', line {number}", record


def _has_lone_surrogate(text: str) -> bool:
    """Whether a text has an unpaired surrogate, which JSON can express but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _not_a_record(where: str) -> InputError:
    return InputError(f"{where}, is not a JSON object ({{...}}); fix that line.")


def documents_of_parquet(path: Path, options: ReadingOptions) -> Iterator[str | None]:
    """Yield the text of each row; None for a row without text.

    Raises:
        InputError: If a column is missing or is not text, or a document is too long.
    """
    with open_parquet(path, options.most_bytes) as table:
        _check_columns(path, table.schema_arrow, options.text_fields)
        number = 0
        for batch in table.iter_batches(batch_size=_DOCUMENTS_AT_ONCE, columns=list(options.text_fields)):
            columns = [batch.column(name) for name in options.text_fields]
            for values in zip(*columns, strict=True):
                texts = dict(zip(options.text_fields, values, strict=True))
                if sum(_size_of(text) for text in texts.values()) > options.most_bytes:
                    raise too_long(f"a document of '{path}'", options.most_bytes)
                record = {name: _decode(text, path) for name, text in texts.items()}
                yield text_of(record, options, f"'{path}', row {number}")
                number += 1


def _check_columns(path: Path, schema: pyarrow.Schema, names: Sequence[str]) -> None:
    for name in names:
        if name not in schema.names:
            raise no_such_field(f"'{path}'", name, schema.names)
        if schema.names.count(name) > 1:
            raise InputError(f"'{path}' has several columns '{name}'; rename all but one.")
        column = schema.field(name).type
        if not is_text(column):
            raise InputError(f"the column '{name}' of '{path}' is {column}, not text; name another.")


def _size_of(text: pyarrow.Scalar) -> int:
    return text.as_buffer().size if text.is_valid else 0


def records_of_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location of each row of a Parquet file, and the row.

    Raises:
        InputError: If two columns have the same name, or a text is not UTF-8.
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


def _decode(text: pyarrow.Scalar, path: Path) -> str | None:
    try:
        return text.as_py()
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 ({error.reason}); convert it to UTF-8 first.") from None


@contextlib.contextmanager
def open_parquet(
    path: Path, most_bytes: int = ReadingOptions().most_bytes
) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a Parquet file; a compressed file is decompressed in memory.

    Raises:
        InputError: If a compressed file decompresses to more than `most_bytes`.
    """
    with open_file(path) as file:
        if path.suffix.lower() not in COMPRESSIONS:
            yield pyarrow.parquet.ParquetFile(file)
            return
        content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise too_long(f"'{path}', decompressed,", most_bytes, "decompress it on disk")
        yield pyarrow.parquet.ParquetFile(io.BytesIO(content))
