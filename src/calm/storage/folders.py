"""Output folders that appear whole or not at all, and never replace what a user would miss."""

import atexit
import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from calm.errors import InputError
from calm.storage.checksums import write_checksums
from calm.storage.disk import disk_errors
from calm.storage.locks import locked
from calm.storage.ours import FolderKind, check_replaceable

_LEAVING, _ASIDE, _GONE = ".replacing", ".replaced", ".gone"


def check_output(path: Path, replaces: FolderKind | None, kept: Collection[str] = ()) -> None:
    """Raise InputError if the folder cannot be made, or holds anything that may not be replaced.

    Args:
        path: The folder.
        replaces: Kind of folder that may be replaced; None if the folder must be new or empty.
        kept: Names in it that are no matter.
    """
    if not path.name:
        raise InputError(f"the output folder '{path}' has no name of its own; give another.")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the output's name {str(path)!r} is not UTF-8; give another.") from error
    if file := next((part for part in (path, *path.parents) if part.is_file()), None):
        raise InputError(f"the output '{path}' cannot be a folder: '{file}' is a file.")
    if not path.is_dir() or all(entry.name in kept for entry in path.iterdir()):
        return
    if replaces is None:
        raise InputError(f"the output folder '{path}' is not empty; choose another or pass --overwrite.")
    check_replaceable(path, replaces)


def check_spared(output: Path, needed: Sequence[str]) -> None:
    """Raise InputError if what a command reads lies in the folder that it replaces.

    Args:
        output: The folder.
        needed: Paths, perhaps with ~ for the home folder; names that are none are passed by.
    """
    for name in needed:
        places = [Path(name)]
        with contextlib.suppress(RuntimeError):  # There is no such user.
            places.append(places[0].expanduser())
        paths = [place.resolve() for place in places if place.exists()]
        if any(output.resolve() in (path, *path.parents) for path in paths):
            raise InputError(
                f"'{name}' lies in the output folder '{output}', where it would be replaced; choose another "
                "output."
            )


def check_file(path: Path, overwrite: bool) -> None:
    """Raise InputError if the file cannot be made, or is there and may not be overwritten."""
    if file := next((part for part in path.parents if part.is_file()), None):
        raise InputError(f"the output '{path}' cannot be a file: '{file}' is one, and no folder.")
    if path.is_dir():
        raise InputError(f"the output '{path}' is a folder; choose another --output.")
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"the output '{path}' is a link to '{path.readlink()}', which is not there; remove it, or choose "
            "another --output."
        )
    if path.exists() and not path.is_file():
        raise InputError(f"the output '{path}' is a device or a pipe, not a file; choose another --output.")
    if path.exists() and not overwrite:
        raise InputError(f"'{path}' exists; choose another --output or pass --overwrite.")


def work_of(output: Path) -> Path:
    """Where work for a prepared folder is kept."""
    return output.with_name(f".{output.name}.work")


def temporary_folder() -> Path:
    """A new folder (see TMPDIR) that ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="calm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Make a folder, and those above it; after an error, those that were made and are empty are removed."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:  # From the inside out.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def emptied(path: Path, kept: Collection[str] = ()) -> Iterator[None]:
    """Empty a folder for the block, and for good when that has ended well; else the folder is as it was.

    After a kill in the block what was there lies in `.replaced`, until `restore` or `discard_replaced`.

    Args:
        path: The folder.
        kept: Names in it that are not touched, neither before nor after.
    """
    restore(path, kept)
    leaving = path / _LEAVING
    leaving.mkdir()
    for entry in _entries(path, kept):
        entry.rename(leaving / entry.name)
    leaving.rename(path / _ASIDE)  # From here on all that was there lies in one place.
    try:
        yield
    except BaseException:
        restore(path, kept)
        raise
    discard_replaced(path)


def restore(path: Path, kept: Collection[str] = ()) -> None:
    """Put back what a stopped command has moved aside; nothing happens where there was none.

    Args:
        path: The folder that was emptied.
        kept: Names in it that are not touched.
    """
    shutil.rmtree(path / _GONE, ignore_errors=True)
    leaving, aside = path / _LEAVING, path / _ASIDE
    if aside.is_dir():
        for entry in _entries(path, kept):
            _remove(entry)
        aside.rename(leaving)
    if leaving.is_dir():
        for entry in list(leaving.iterdir()):
            entry.rename(path / entry.name)
        leaving.rmdir()


def discard_replaced(path: Path) -> None:
    """Remove what was moved aside in a folder, if anything was."""
    shutil.rmtree(path / _GONE, ignore_errors=True)
    if (path / _ASIDE).is_dir():
        (path / _ASIDE).rename(path / _GONE)  # At once: what is half removed cannot be put back.
        shutil.rmtree(path / _GONE, ignore_errors=True)


def _entries(path: Path, kept: Collection[str]) -> list[Path]:
    untouched = {_LEAVING, _ASIDE, _GONE, *kept}
    return [entry for entry in path.iterdir() if entry.name not in untouched]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def written_whole(path: Path, replaces: FolderKind | None = None) -> Iterator[Path]:
    """A folder to write in that becomes `path` when the block ends without an error.

    Until then nothing at `path` is touched, and after an error nothing is left behind.

    Args:
        path: The folder.
        replaces: Kind of folder that may be replaced; None if `path` must be new or empty.

    Raises:
        InputError: If there is anything at `path` that may not be replaced, or another process writes it.
        RunError: If the disk is full, or cannot be written.
    """
    path = path.resolve() if path.is_symlink() else path
    partial, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    lock = path.with_name(f".{path.name}.lock")
    _check_left_behind(lock, partial, replaced)
    if replaced.is_dir() and not path.exists():  # A kill between two renames.
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
            check_output(path, replaces)  # It took a while.
            write_checksums(partial)
            _put_in_place(partial, path, replaced)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_left_behind(lock: Path, *left: Path) -> None:
    """Raise InputError if what a stopped command would have left is there, and none has left it.

    A lock outlives the process that is killed, so what lies there without one is not ours to remove.
    """
    if lock.exists():
        return
    if found := next((path for path in left if path.is_symlink() or path.exists()), None):
        raise InputError(
            f"'{found}' is in the way, where a folder is kept until it is whole; move it away, or choose "
            "another output."
        )


def _put_in_place(partial: Path, path: Path, replaced: Path) -> None:
    """Rename a finished folder; what was at the path goes."""
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


def free_name(path: Path) -> Path:
    """The path if nothing is there, else the first of NAME-2, NAME-3 and so on that is free."""
    others = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())
