"""Records of .jsonl and .parquet files and of hub datasets, each with where it stands."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from calm.data.files import find_files, format_of, is_here
from calm.data.reading import DAMAGE, has_half_a_pair, json_lines, open_parquet
from calm.data.sources import check_sources, load_hub_dataset
from calm.errors import InputError, reason_of

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
            except DAMAGE as error:
                raise InputError(f"cannot read '{file}': it is damaged ({reason_of(error)}).") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, record in json_lines(path):
        if not isinstance(record, dict):
            raise InputError(f"'{path}', line {number}, is no record ({{...}}); mend that line.")
        if has_half_a_pair(json.dumps(record, ensure_ascii=False)):
            raise InputError(f"'{path}', line {number}, has half a surrogate pair in a text; mend that line.")
        yield f"'{path}', line {number}", record


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_parquet(path) as table:
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            if len(set(batch.schema.names)) < len(batch.schema.names):
                raise InputError(f"'{path}' has columns of the same name; rename all but one.")
            try:
                records = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise InputError(f"'{path}' is not UTF-8 ({error.reason}); convert it first.") from None
            for record in records:
                yield f"'{path}', row {number}", record
                number += 1
