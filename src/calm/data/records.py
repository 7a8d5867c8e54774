"""Records of .jsonl and .parquet files, saved datasets and hub datasets, each with its location."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from calm.data.files import find_files, is_local
from calm.data.formats import read_records
from calm.data.rows import is_saved, load_hub_dataset, train_rows
from calm.data.shards import check_sources


def load_records(sources: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location of each record (for messages) and the record.

    Args:
        sources: Files, folders (of files, or written by `save_to_disk`), or hub datasets. Of datasets with
            splits, `train` is read.

    Raises:
        InputError: If a source is missing, damaged, or has no records.
    """
    check_sources(sources)
    for source in sources:
        if is_local(source) and not is_saved(Path(source)):
            for file in find_files(Path(source), log_excluded=True):
                yield from read_records(file)
            continue
        rows = train_rows(source) if is_local(source) else load_hub_dataset(source)
        for number, row in enumerate(rows):
            yield f"'{source}', row {number}", row
