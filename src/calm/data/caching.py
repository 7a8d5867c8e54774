"""Datasets cached on disk: loaded if their files are intact, else made again."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow

from calm.storage.checksums import matches_checksum, write_file_checksum

logger = logging.getLogger(__name__)


def load_or_make(
    make: Callable[[], datasets.Dataset], cache: Path, contents: str, *, has_folders: bool = False
) -> datasets.Dataset:
    """Load a dataset from its cache files if they are intact, else make it, and write checksums of its files.

    Files that have been damaged, or whose writer was killed, are removed, and the function is called again.

    Args:
        make: Makes the dataset and caches it in files, or loads it from them.
        cache: Folder that contains these files.
        contents: What the dataset contains, for the log.
        has_folders: Whether each dataset has a folder of its own, to be removed with a damaged file.
    """
    before = set(cache.rglob("*.arrow"))
    try:
        dataset = make()
        reused = _files_of(dataset) & before
        damaged = {file for file in reused if not matches_checksum(file)}
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # The disk failed, not a file.
            raise
        damaged = {file for file in before if not matches_checksum(file)}
        if not damaged:
            raise
    if damaged:
        logger.warning("'%s' holds %s that are damaged or incomplete; rebuilding them.", cache, contents)
        for file in damaged:
            if has_folders:
                shutil.rmtree(file.parent, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)
        before -= damaged
        dataset = make()
    for file in _files_of(dataset) - before:
        write_file_checksum(file)
    return dataset


def _files_of(dataset: datasets.Dataset) -> set[Path]:
    return {Path(file["filename"]) for file in dataset.cache_files}
