"""Output folders that appear whole or not at all, and never replace what a user had."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from calm.errors import InputError


def check_output(path: Path, overwrite: bool) -> None:
    """Raise InputError if the folder cannot be made, or holds anything and may not be overwritten."""
    if not path.name:
        raise InputError(f"the output folder '{path}' has no name of its own; give another.")
    if file := next((part for part in (path, *path.parents) if part.is_file()), None):
        raise InputError(f"the output '{path}' cannot be a folder: '{file}' is a file.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"the output folder '{path}' is not empty; choose another or pass --overwrite.")


def check_file(path: Path, overwrite: bool) -> None:
    """Raise InputError if the file cannot be made, or is there and may not be overwritten."""
    check_output(path.parent, overwrite=True)
    if path.exists() and not overwrite:
        raise InputError(f"'{path}' exists; choose another --output or pass --overwrite.")


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
        try:
            partial.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
