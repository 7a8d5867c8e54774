"""Records of .jsonl and .parquet files and of hub datasets, each with where it stands."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from calm.data.files import find_files, is_here
from calm.data.formats import read_records
from calm.data.sources import check_sources, load_hub_dataset


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
            yield from read_records(file)
