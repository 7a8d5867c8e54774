"""Output folders that appear whole or not at all, and never replace what a user had."""

import contextlib
import errno
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from calm.errors import InputError, RunError, reason_of

_ERRORS_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)
_ASIDE = ".replaced"
_WORDS_OF_TORCH = ("PytorchStreamWriter", "unexpected pos", "iostream error")


def check_output(path: Path, overwrite: bool) -> None:
    """Raise InputError if the folder cannot be made, or holds anything and may not be overwritten."""
    if not path.name:
        raise InputError(f"the output folder '{path}' has no name of its own; give another.")
    if file := next((part for part in (path, *path.parents) if part.is_file()), None):
        raise InputError(f"the output '{path}' cannot be a folder: '{file}' is a file.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"the output folder '{path}' is not empty; choose another or pass --overwrite.")


def check_spared(output: Path, needed: Sequence[str]) -> None:
    """Raise InputError if what a command reads lies in the folder that it replaces.

    Args:
        output: The folder.
        needed: Paths; names that are none are passed by.
    """
    for name in needed:
        path = Path(name).resolve()
        if path.exists() and output.resolve() in (path, *path.parents):
            raise InputError(
                f"'{name}' lies in the output folder '{output}', where it would be replaced; choose another "
                "output."
            )


def check_file(path: Path, overwrite: bool) -> None:
    """Raise InputError if the file cannot be made, or is there and may not be overwritten."""
    check_output(path.parent, overwrite=True)
    if path.exists() and not overwrite:
        raise InputError(f"'{path}' exists; choose another --output or pass --overwrite.")


def work_of(output: Path) -> Path:
    """Where work for a prepared folder is kept."""
    return output.with_name(f".{output.name}.work")


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
    """Empty a folder for the block; if that refuses its input, the folder is as it was.

    Args:
        path: The folder.
        kept: Names in it that are not touched, neither before nor after.

    Raises:
        InputError: As the block does.
    """
    aside = path / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    untouched = {aside.name, *kept}
    for entry in list(path.iterdir()):
        if entry.name not in untouched:
            entry.rename(aside / entry.name)
    try:
        yield
    except InputError:
        for entry in list(path.iterdir()):
            if entry.name not in untouched:
                _remove(entry)
        for entry in list(aside.iterdir()):
            entry.rename(path / entry.name)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def disk_errors(path: Path, left: str = "nothing that was there is lost") -> Iterator[None]:
    """Turn what a full or failing disk raises inside the block into one sentence.

    Args:
        path: What is being written.
        left: What is left, for the message.

    Raises:
        RunError: If the disk is full, or cannot be written.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        raise RunError(f"'{path}' could not be written ({reason_of(error)}); {left}.") from error


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether an error, or one behind it, tells of a disk; writers of weights have errors of their own."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in _ERRORS_OF_THE_DISK:
            return True
        if isinstance(chain, SafetensorError) and "I/O error" in str(chain):
            return True
        if isinstance(chain, RuntimeError) and any(word in str(chain) for word in _WORDS_OF_TORCH):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def write_file_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def written_whole(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write in that becomes `path` when the block ends without an error.

    Until then nothing at `path` is touched, and after an error nothing is left behind.

    Raises:
        InputError: If `path` is not empty and `overwrite` is False.
        RunError: If the disk is full, or cannot be written.
    """
    check_output(path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors(path), new_folder(path.parent):
        partial.mkdir()
        try:
            yield partial
            _put_in_place(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished folder; what was at the path goes."""
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
