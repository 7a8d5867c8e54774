"""Datasets cached on disk: reused if their files are intact, else made again."""

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
    """Make a dataset with a function that caches it in files, or load it from there.

    Files that have been damaged, or whose writer was killed, are removed, and the function is called again.

    Args:
        make: Makes the dataset, or loads it from its files.
        below: Folder that contains all these files.
        what: What the dataset is, for the message.
        has_folders: Whether each dataset has its own folder.
    """
    before = set(below.rglob("*.arrow"))
    try:
        dataset = make()
        taken = _files_of(dataset) & before
        damaged = {file for file in taken if not is_marked(file)}
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # The disk failed; no file is damaged.
            raise
        damaged = {file for file in before if not is_marked(file)}
        if not damaged:
            raise
    if damaged:
        logger.warning("'%s' holds %s that are damaged or incomplete; rebuilding them.", below, what)
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
