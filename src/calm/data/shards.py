"""Sources -> shards: files, and parts of datasets, each read from start to end."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import datasets
import pyarrow

from calm.data.files import find_files, is_local
from calm.data.formats import read_documents
from calm.data.options import ReadingOptions
from calm.data.rows import (
    Rows,
    Source,
    check_hub_name,
    files_of_saved,
    is_saved,
    load_hub_dataset,
    no_such_dataset,
    quoted,
    select_text_fields,
    texts_of,
    train_rows,
)
from calm.errors import InputError, reason_of
from calm.storage.ours import PREPARED

_PART_BYTES = 2**26
Use = Literal["whole", "sample", "stream"]


@dataclass(frozen=True)
class Shard:
    """Documents that are read one after another.

    Args:
        read: Yields its documents; None for each record without text.
        num_bytes: Approximately how many bytes are read.
        stamp: Changes whenever the documents may have changed; None if that cannot be known.
        is_in_memory: Whether only this process can read it.
    """

    read: Callable[[], Iterator[str | None]]
    num_bytes: int = 0
    stamp: tuple[str | int, ...] | None = None
    is_in_memory: bool = False


def check_sources(sources: Sequence[Source]) -> None:
    """Check the names of sources before any work is done; the hub is not asked for datasets.

    Raises:
        InputError: If there are no sources, or one is missing or of an unknown format.
    """
    if not sources:
        raise InputError("no text source is given; give a file, a folder or a hub dataset.")
    for source in sources:
        if not isinstance(source, str):
            train_rows(source)
        elif not is_local(source):
            check_hub_name(source)
        elif is_saved(Path(source)):
            train_rows(source)
        elif (Path(source) / PREPARED.sign).is_file():
            raise InputError(
                f"'{source}' is prepared text, which a recipe accepts only as its sole source; give the raw "
                "text."
            )
        else:
            find_files(Path(source))


def files_of(source: str) -> list[Path]:
    """The files of a source; empty for a hub dataset."""
    if not is_local(source):
        return []
    return files_of_saved(Path(source)) if is_saved(Path(source)) else find_files(Path(source))


def find_shards(sources: Sequence[Source], options: ReadingOptions) -> list[Shard]:
    """The shards of the sources, for streaming: nothing is read yet, and hub datasets are not stored.

    Args:
        sources: As for `calm.data.sources.load_documents`.
        options: How to find documents.

    Raises:
        InputError: If a source is missing or of an unknown format, or lacks a text field.
    """
    check_sources(sources)
    return [shard for source in sources for shard in shards_of(source, options, "stream")]


def shards_of(
    source: Source, options: ReadingOptions, use: Use, *, log_excluded: bool = False
) -> Iterator[Shard]:
    """The shards of a source.

    Args:
        source: The source.
        options: How to find documents.
        use: What the shards are for. A hub dataset is downloaded for "whole" and streamed otherwise; for
            "sample", a dataset is a single shard.
        log_excluded: Whether to log what was left out of a folder.

    Raises:
        InputError: As for `find_shards`.
    """
    if isinstance(source, str) and is_local(source) and not is_saved(Path(source)):
        for file in find_files(Path(source), log_excluded=log_excluded):
            status = file.stat()
            # The stamp must change when the file is modified.
            stamp = (str(file), status.st_size, status.st_mtime_ns)
            yield Shard(partial(read_documents, file, options), status.st_size, stamp)
        return
    if isinstance(source, str) and not is_local(source):
        rows = load_hub_dataset(source, streaming=use != "whole")
    else:
        rows = train_rows(source)
    rows = select_text_fields(rows, options, source)
    for part, where, first in _split_rows(rows, use, quoted(source)):
        yield _make_shard(part, source, options, where, first)


def _split_rows(rows: Rows, use: Use, name: str) -> Iterator[tuple[Rows, str, int]]:
    """Yield parts that can be read in parallel, each with its name and its first row number for messages."""
    if use == "sample":
        num_parts = 1
    elif isinstance(rows, datasets.IterableDataset):
        num_parts = rows.num_shards if use == "stream" else 1
    else:
        num_parts = min(len(rows), rows.data.nbytes // _PART_BYTES) if rows.cache_files else 1
    if num_parts <= 1:
        yield rows, name, 0
        return
    first = 0
    for index in range(num_parts):
        part = rows.shard(num_parts, index)
        if isinstance(part, datasets.Dataset):
            yield part, name, first
            first += len(part)
        else:  # How many rows precede it is not known.
            yield part, f"{name}, part {index}", 0


def _make_shard(rows: Rows, source: Source, options: ReadingOptions, where: str, first: int) -> Shard:
    read = partial(_read_rows, rows, source, options, where, first)
    if isinstance(rows, datasets.IterableDataset):
        return Shard(read, is_in_memory=True)
    files = [Path(file["filename"]) for file in rows.cache_files]
    versions = [part for file in files for part in (str(file), file.stat().st_mtime_ns)]
    return Shard(read, rows.data.nbytes, (rows._fingerprint, *versions), is_in_memory=not files)


def _read_rows(
    rows: Rows, source: Source, options: ReadingOptions, where: str, first: int
) -> Iterator[str | None]:
    try:
        if isinstance(source, str) and isinstance(rows, datasets.Dataset):
            rows.data.table.validate(full=True)  # Arrow trusts the lengths in memory-mapped files.
        yield from texts_of(rows, options, where, first)
    except InputError:
        raise
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot read {quoted(source)}: it is damaged ({reason_of(error)}).") from error
    except Exception as error:
        if not isinstance(source, str) or is_local(source):
            raise
        raise no_such_dataset(source, error) from error
