"""Datasets that lie on the disk from before: taken if they are as they were written, else made again."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow

from calm.storage.checksums import is_marked, mark

logger = logging.getLogger(__name__)


def made_or_kept(
    make: Callable[[], datasets.Dataset], below: Path, what: str, *, has_folders: bool = False
) -> datasets.Dataset:
    """What a function of `datasets` makes in files, or has made there before.

    Files that were damaged meanwhile, or whose writer was killed, are removed, and the function is called
    again.

    Args:
        make: Makes the dataset, or takes it from its files.
        below: Folder of all these files.
        what: What it is, for the message.
        has_folders: Whether each dataset has a folder of its own.
    """
    before = set(below.rglob("*.arrow"))
    try:
        dataset = make()
        taken = _files_of(dataset) & before
        damaged = {file for file in taken if not is_marked(file)}
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Of the disk, not of a damaged file.
            raise
        damaged = {file for file in before if not is_marked(file)}
        if not damaged:
            raise
    if damaged:
        logger.warning(
            "'%s' holds %s that are damaged or were not finished; they are made again.", below, what
        )
        for file in damaged:
            if has_folders:
                shutil.rmtree(file.parent, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)
        before -= damaged
        dataset = make()
    for file in _files_of(dataset) - before:
        mark(file)
    return dataset


def _files_of(dataset: datasets.Dataset) -> set[Path]:
    return {Path(file["filename"]) for file in dataset.cache_files}
