"""Output folders that appear complete or not at all, and never replace anything a user would miss."""

import atexit
import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from calm.errors import InputError
from calm.storage.checksums import write_checksums
from calm.storage.disk import disk_errors, expand_user
from calm.storage.locks import locked
from calm.storage.ours import FolderKind, check_replaceable

_LEAVING, _ASIDE, _GONE = ".replacing", ".replaced", ".gone"


def check_output(path: Path, replaces: FolderKind | None, ignored: Collection[str] = ()) -> None:
    """Raise InputError if the folder cannot be created, or contains anything that may not be replaced.

    Args:
        path: The folder.
        replaces: Kind of folder that may be replaced; None if the folder must be new or empty.
        ignored: Names in it that do not count.
    """
    if not path.name:
        raise InputError(f"the output folder '{path}' has no name of its own; give another.")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the output's name {str(path)!r} is not UTF-8; give another.") from error
    if file := next((part for part in (path, *path.parents) if part.is_file()), None):
        raise InputError(f"the output '{path}' cannot be a folder: '{file}' is a file.")
    if not path.is_dir() or all(entry.name in ignored for entry in path.iterdir()):
        return
    if replaces is None:
        raise InputError(f"the output folder '{path}' is not empty; choose another or pass --overwrite.")
    check_replaceable(path, replaces)


def check_inputs_outside(output: Path, inputs: Sequence[str]) -> None:
    """Raise InputError if anything that a command reads is inside the folder that it replaces.

    Args:
        output: The folder.
        inputs: Paths, where ~ is the home folder; names that are not existing paths are ignored.
    """
    for name in inputs:
        paths = [path.resolve() for path in (Path(name), expand_user(name)) if path.exists()]
        if any(output.resolve() in (path, *path.parents) for path in paths):
            raise InputError(
                f"'{name}' lies in the output folder '{output}', where it would be replaced; choose another "
                "output."
            )


def check_file(path: Path, overwrite: bool) -> None:
    """Raise InputError if the file cannot be created, or exists and may not be overwritten."""
    if file := next((part for part in path.parents if part.is_file()), None):
        raise InputError(f"the output '{path}' cannot be a file: '{file}' is a file, not a folder.")
    if path.is_dir():
        raise InputError(f"the output '{path}' is a folder; choose another --output.")
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"the output '{path}' is a link to '{path.readlink()}', which does not exist; remove it, or "
            "choose another --output."
        )
    if path.exists() and not path.is_file():
        raise InputError(f"the output '{path}' is a device or a pipe, not a file; choose another --output.")
    if path.exists() and not overwrite:
        raise InputError(f"'{path}' exists; choose another --output or pass --overwrite.")


def work_path(output: Path) -> Path:
    """The folder that keeps unfinished work for a prepared folder."""
    return output.with_name(f".{output.name}.work")


def temporary_folder() -> Path:
    """Create a temporary folder (see TMPDIR) that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="calm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Create a folder and its parents; after an error, remove those that were created and are empty."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in created:  # Innermost first.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def emptied(path: Path, ignored: Collection[str] = ()) -> Iterator[None]:
    """Empty a folder for the block: for good if the block succeeds, otherwise the contents are restored.

    After a kill in the block, the old contents are in `.replaced` until `restore` or `discard_replaced`.

    Args:
        path: The folder.
        ignored: Names in it that are never touched.
    """
    restore(path, ignored)
    leaving = path / _LEAVING
    leaving.mkdir()
    for entry in _entries(path, ignored):
        entry.rename(leaving / entry.name)
    leaving.rename(path / _ASIDE)  # From here on, the old contents are complete in one place.
    try:
        yield
    except BaseException:
        restore(path, ignored)
        raise
    discard_replaced(path)


def restore(path: Path, ignored: Collection[str] = ()) -> None:
    """Put back what a stopped command had moved aside, if anything.

    Args:
        path: The folder that was emptied.
        ignored: Names in it that are not touched.
    """
    shutil.rmtree(path / _GONE, ignore_errors=True)
    leaving, aside = path / _LEAVING, path / _ASIDE
    if aside.is_dir():
        for entry in _entries(path, ignored):
            _remove(entry)
        aside.rename(leaving)
    if leaving.is_dir():
        for entry in list(leaving.iterdir()):
            entry.rename(path / entry.name)
        leaving.rmdir()


def discard_replaced(path: Path) -> None:
    """Remove what was moved aside in a folder, if anything."""
    shutil.rmtree(path / _GONE, ignore_errors=True)
    if (path / _ASIDE).is_dir():
        # Renamed first, since contents that are half removed must not be restored.
        (path / _ASIDE).rename(path / _GONE)
        shutil.rmtree(path / _GONE, ignore_errors=True)


def _entries(path: Path, ignored: Collection[str]) -> list[Path]:
    untouched = {_LEAVING, _ASIDE, _GONE, *ignored}
    return [entry for entry in path.iterdir() if entry.name not in untouched]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path, replaces: FolderKind | None = None) -> Iterator[Path]:
    """Provide a folder to write in, which becomes `path` when the block ends without an error.

    Until then nothing at `path` is touched, and after an error nothing is left behind.

    Args:
        path: The folder.
        replaces: Kind of folder that may be replaced; None if `path` must be new or empty.

    Raises:
        InputError: If there is anything at `path` that may not be replaced, or another process writes there.
        RunError: If the disk is full or cannot be written.
    """
    path = path.resolve() if path.is_symlink() else path
    partial, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    lock = path.with_name(f".{path.name}.lock")
    _check_leftovers(lock, partial, replaced)
    if replaced.is_dir() and not path.exists():  # A process was killed between two renames.
        replaced.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
    check_output(path, replaces)
    with (
        disk_errors(path),
        new_folder(path.parent),
        locked(lock, f"'{path}'"),
    ):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            check_output(path, replaces)  # Again: something may have appeared meanwhile.
            write_checksums(partial)
            _put_in_place(partial, path, replaced)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_leftovers(lock: Path, *leftovers: Path) -> None:
    """Raise InputError if leftovers of a stopped command seem to exist, but were not left by one.

    A killed process leaves its lock file behind, so anything there without one is not ours to remove.
    """
    if lock.exists():
        return
    if entry := next((path for path in leftovers if path.is_symlink() or path.exists()), None):
        raise InputError(
            f"'{entry}' is in the way: calm needs that name for a temporary folder; move it away, or choose "
            "another output."
        )


def _put_in_place(partial: Path, path: Path, replaced: Path) -> None:
    """Move a finished folder to its path, and remove what was there."""
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


def unused_path(path: Path) -> Path:
    """The path if nothing exists there, else the first free one of NAME-2, NAME-3 and so on."""
    others = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())
