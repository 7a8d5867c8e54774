"""Errors of full, failing and read-only disks; and files that are written atomically."""

import contextlib
import errno
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from calm.errors import InputError, RunError, reason_of

_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)
_TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "unexpected pos", "iostream error")
_MAX_NAME_LENGTH = 50  # Characters, of up to 4 bytes each; file systems allow 255 bytes.

Value = TypeVar("Value", dict, list)


def expand_user(name: str) -> Path:
    """A path with ~ expanded to the home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # There is no such user.
        return Path(name)


@contextlib.contextmanager
def disk_errors(path: Path, consequence: str = "no existing data was lost") -> Iterator[None]:
    """Turn errors of a full or failing disk inside the block into one sentence.

    Args:
        path: What is being written.
        consequence: What this means for the user's data, for the message.

    Raises:
        RunError: If the disk is full or cannot be written.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        if not _is_disk_error(error):
            raise
        raise RunError(f"'{path}' could not be written ({reason_of(error)}); {consequence}.") from error


def _is_disk_error(error: BaseException) -> bool:
    """Whether an error, or one of its causes, comes from the disk; safetensors and torch raise their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRNOS:
            return True
        if isinstance(cause, SafetensorError) and "I/O error" in str(cause):
            return True
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in _TORCH_WRITE_ERRORS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def read_json(path: Path, kind: type[Value]) -> Value:
    """Read a JSON file.

    Args:
        path: The file.
        kind: Required type of its value: dict or list.

    Raises:
        InputError: If it cannot be read, is not JSON, or has a value of another type.
        FileNotFoundError: If there is no such file.
    """
    return _values_of(path, kind, lambda text: [text])[0]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file, one per line that is not blank.

    Raises:
        InputError: If it cannot be read, or a line is not a JSON object.
        FileNotFoundError: If there is no such file.
    """
    # Not splitlines, which also splits at characters that JSON strings may contain, such as U+2028.
    return _values_of(path, dict, lambda text: [line for line in text.split("\n") if line.strip()])


def _values_of(path: Path, kind: type[Value], parts_of: Callable[[str], list[str]]) -> list[Value]:
    try:
        values = [json.loads(part) for part in parts_of(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged ({reason_of(error)}); restore it or move it away.") from error
    if not all(isinstance(value, kind) for value in values):
        raise InputError(f"'{path}' is damaged (it holds no {kind.__name__}); restore it or move it away.")
    return values


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically, so that a kill leaves its old or its new contents; a link stays a link."""
    write_lines_atomically(path, [text])


def write_lines_atomically(path: Path, lines: Iterable[str]) -> None:
    """Like `write_atomically`, for lines that need not fit in memory together.

    Until it is complete, the file has a unique name, so that no other file beside it is overwritten.

    Args:
        path: The file.
        lines: The lines, line ends included.
    """
    path = path.resolve()
    partial = path.with_name(unfinished_name(path.name, secrets.token_hex(4)))
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.writelines(lines)
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def unfinished_name(name: str, tag: str) -> str:
    """The temporary name of a file until it is complete.

    Args:
        name: Its final name, of which only the beginning is used, since file systems limit the length.
        tag: Distinguishes this write from others; "*" gives a pattern that matches all leftovers.
    """
    return f".{name[:_MAX_NAME_LENGTH]}.{tag}.partial"
