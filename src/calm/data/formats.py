"""The file formats that text and examples are read from: one table, which other packages can extend.

A format is recognized by the file suffix, which a compression suffix may follow (`a.jsonl.gz`).

    from calm import register_format

    register_format(".srt", documents=read_subtitles)

`examples/a_data_source_of_your_own.py` is a complete example.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from calm.data.compression import COMPRESSIONS, name_without_compression
from calm.data.options import ReadingOptions
from calm.data.reading import (
    DAMAGE,
    documents_of_json_lines,
    documents_of_parquet,
    documents_of_text,
    records_of_json_lines,
    records_of_parquet,
)
from calm.errors import InputError, reason_of

logger = logging.getLogger(__name__)
DocumentReader = Callable[[Path, ReadingOptions], Iterable[str | None]]
RecordReader = Callable[[Path], Iterable[tuple[str, dict[str, Any]]]]
_ENTRY_POINTS = "calm.formats"


@dataclass(frozen=True)
class Format:
    """How files of a suffix are read.

    Args:
        documents: Path and options -> the documents of a file, for training; None for a record without text.
        records: Path -> the location of each record (for messages) and its fields, for fine-tuning; None if
            such files have no records.
    """

    documents: DocumentReader
    records: RecordReader | None = None


# Prose only. Logs and code may be in any folder; they are read only if the user names them.
PLAIN_TEXT = (".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex")
FORMATS = dict.fromkeys(PLAIN_TEXT, Format(documents_of_text)) | {
    ".jsonl": Format(documents_of_json_lines, records_of_json_lines),
    ".parquet": Format(documents_of_parquet, records_of_parquet),
}


def register_format(suffix: str, documents: DocumentReader, records: RecordReader | None = None) -> None:
    """Register a reader for files with a suffix, wherever calm takes text: files, folders, streams.

    An installed package can instead declare a module that calls this as an entry point of the group
    "calm.formats". Then the `calm` command knows the format too.

    Args:
        suffix: The suffix in lower case, such as ".srt". An existing format is replaced.
        documents: Path and options -> the documents of a file; None for a record without text.
            `calm.data.compression.open_file` opens a file that may be compressed,
            `calm.data.reading.numbered_lines` reads its lines as UTF-8. Raise `calm.errors.InputError` to
            report a bad file in one sentence.
        records: Path -> the location of each record (for messages) and its fields; None if such files have
            no records.

    Raises:
        ValueError: If the suffix is not valid for a format.
    """
    if not suffix.startswith(".") or suffix != suffix.lower() or suffix in (".", *COMPRESSIONS):
        raise ValueError(
            "the suffix of a format must begin with a dot, be in lower case and not be that of a "
            f"compression format; got {suffix!r}."
        )
    FORMATS[suffix] = Format(documents, records)


def format_of(path: Path) -> Format | None:
    """The format of a file, judged by its name; None if unknown."""
    name = name_without_compression(path)
    matching = [suffix for suffix in known_suffixes() if name.endswith(suffix)]
    return FORMATS[max(matching, key=len)] if matching else None


def known_suffixes() -> list[str]:
    """The suffixes of all formats, including those of installed packages."""
    _load_installed()
    return list(FORMATS)


def read_documents(path: Path, options: ReadingOptions) -> Iterator[str | None]:
    """Yield the documents of a file, except blank ones; None for each record without text.

    Raises:
        InputError: If the file is damaged or not UTF-8, or the text of a record is not a string.
    """
    file_format = format_of(path) or FORMATS[".txt"]
    try:
        for document in file_format.documents(path, options):
            if document is None or document.strip():
                yield document
    except DAMAGE as error:
        raise InputError(
            f"cannot read '{path}': it is damaged or not what its name says ({reason_of(error)})."
        ) from error


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location of each record of a file, and the record.

    Raises:
        InputError: If the file is damaged, or its format has no records.
    """
    file_format = format_of(path)
    if file_format is None or file_format.records is None:
        with_records = [suffix for suffix in known_suffixes() if FORMATS[suffix].records]
        raise InputError(f"'{path}' has no records; examples come in {' or '.join(with_records)} files.")
    try:
        yield from file_format.records(path)
    except DAMAGE as error:
        raise InputError(f"cannot read '{path}': it is damaged ({reason_of(error)}).") from error


@functools.cache
def _load_installed() -> None:
    """Import the modules of installed packages that register formats, once."""
    for entry_point in entry_points(group=_ENTRY_POINTS):
        try:
            entry_point.load()
        except Exception as error:  # Whatever goes wrong there must not affect the other formats.
            logger.warning("skipping the format '%s' of %s: %s", entry_point.name, entry_point.value, error)
