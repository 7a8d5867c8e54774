"""Output folders that appear whole or not at all, and never replace what a user had."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from calm.errors import InputError


def check_output(path: Path, overwrite: bool) -> None:
    """Raise InputError if the folder holds anything and may not be overwritten."""
    if path.is_file():
        raise InputError(f"the output '{path}' is a file; give a folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"the output folder '{path}' is not empty; choose another or pass --overwrite.")


@contextlib.contextmanager
def written_whole(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write in that becomes `path` when the block ends without an error.

    Until then nothing at `path` is touched, and after an error nothing is left behind.

    Raises:
        InputError: If `path` is not empty and `overwrite` is False.
    """
    check_output(path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replaced = path.with_name(f".{path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
