"""Records of .jsonl and .parquet files and of hub datasets, each with where it stands."""

import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from calm.data.files import find_files, format_of, is_here, open_file
from calm.data.sources import check_sources, has_half_a_pair, load_hub_dataset, numbered_lines
from calm.errors import InputError

_ROWS_AT_ONCE = 1000


def load_records(sources: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a record stands, and the record.

    Args:
        sources: Files, folders, or hub datasets (the train split).

    Raises:
        InputError: If a source is missing, damaged, or has no records.
    """
    check_sources(sources)
    for source in sources:
        if not is_here(source):
            for number, row in enumerate(load_hub_dataset(source)):
                yield f"'{source}', row {number}", row
            continue
        for file in find_files(Path(source), tell=True):
            readers = {".jsonl": _json_lines, ".parquet": _rows}
            if (reader := readers.get(format_of(file) or "")) is None:
                raise InputError(f"'{file}' has no records; examples come in .jsonl or .parquet files.")
            try:
                yield from reader(file)
            except (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
                raise InputError(f"cannot read '{file}': it is damaged ({error}).") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"'{path}', line {number}, is not JSON ({error}); mend that line.") from None
        if not isinstance(record, dict):
            raise InputError(f"'{path}', line {number}, is no record ({{...}}); mend that line.")
        if has_half_a_pair(json.dumps(record, ensure_ascii=False)):
            raise InputError(f"'{path}', line {number}, has half a surrogate pair in a text; mend that line.")
        yield f"'{path}', line {number}", record


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_file(path) as file:
        table = pyarrow.parquet.ParquetFile(file if path.suffix == ".parquet" else io.BytesIO(file.read()))
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            for record in batch.to_pylist():
                yield f"'{path}', row {number}", record
                number += 1
