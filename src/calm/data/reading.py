"""The documents of one file: text, JSON lines or parquet, plain or packed."""

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

from calm.data.files import PACKINGS, format_of, open_file
from calm.errors import InputError, reason_of

_ROWS_AT_ONCE = 100
# What the libraries raise for files that are damaged or something else than they say.
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How documents are found in what is read.

    Args:
        text_field: Field of the text in JSON lines, parquet files and hub datasets.
        separator: A line that parts the documents of a .txt file ("" for a blank line); None if
            each file is one document.
        max_document_mb: Longest document or line, and longest parquet file that is packed, in MB (10^6
            bytes): they are read into memory whole.
    """

    text_field: str = "text"
    separator: str | None = None
    max_document_mb: int = 1000

    @property
    def most_bytes(self) -> int:
        """Bytes of a document at most."""
        return self.max_document_mb * 10**6


def read_documents(path: Path, options: ReadingOptions) -> Iterator[str]:
    """Documents of one file, without those that are blank.

    Raises:
        InputError: If the file is damaged, not UTF-8, or a record has no text.
    """
    readers = {".txt": _read_text, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    reader = readers[format_of(path) or ".txt"]
    try:
        for document in reader(path, options):
            if document.strip():
                yield document
    except DAMAGE as error:
        raise InputError(
            f"cannot read '{path}': it is damaged or not what its name says ({reason_of(error)})."
        ) from error


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


def _read_text(path: Path, options: ReadingOptions) -> Iterator[str]:
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


def json_lines(path: Path, most_bytes: int = ReadingOptions().most_bytes) -> Iterator[tuple[int, Any]]:
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


def _read_json_lines(path: Path, options: ReadingOptions) -> Iterator[str]:
    for number, record in json_lines(path, options.most_bytes):
        text = record.get(options.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(
                f"'{path}', line {number}, has no text in a field '{options.text_field}'; "
                "mend that line or name another field."
            )
        if has_half_a_pair(text):
            raise InputError(
                f"'{path}', line {number}, has half a surrogate pair in its text; mend that line."
            )
        yield text


def has_half_a_pair(text: str) -> bool:
    """Whether a text holds half a surrogate pair, which JSON can name and UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_parquet(path: Path, options: ReadingOptions) -> Iterator[str]:
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
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[options.text_field]):
            for text in batch.column(0):
                if text.is_valid and (size := text.as_buffer().size):
                    if size > options.most_bytes:
                        raise _too_long(f"a document of '{path}'", options.most_bytes)
                    yield _decoded(text, path)


def _decoded(text: pyarrow.Scalar, path: Path) -> str:
    try:
        return text.as_py()
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 ({error.reason}); convert it to UTF-8 first.") from None


@contextlib.contextmanager
def open_parquet(
    path: Path, most_bytes: int = ReadingOptions().most_bytes
) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A parquet file; one that is packed is unpacked in memory.

    Raises:
        InputError: If it is packed, and unpacks to more than `most_bytes`.
    """
    with open_file(path) as file:
        if path.suffix.lower() not in PACKINGS:
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
