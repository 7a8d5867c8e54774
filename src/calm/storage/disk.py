"""What a disk does to a program: full, failing, read-only; and files that are written whole."""

import contextlib
import errno
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from calm.errors import InputError, RunError, reason_of

_ERRORS_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)
_WORDS_OF_TORCH = ("PytorchStreamWriter", "unexpected pos", "iostream error")
_MOST_OF_A_NAME = 50  # Characters, of up to 4 bytes; a file system takes 255 bytes.

Value = TypeVar("Value", dict, list)


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


def read_json(path: Path, kind: type[Value]) -> Value:
    """What a JSON file holds.

    Args:
        path: The file.
        kind: What that must be: dict or list.

    Raises:
        InputError: If it cannot be read, is no JSON, or holds something else.
        FileNotFoundError: If there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is damaged ({reason_of(error)}); restore it or move it away.") from error
    if not isinstance(value, kind):
        raise InputError(f"'{path}' is damaged (it holds no {kind.__name__}); restore it or move it away.")
    return value


def write_file_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one whole; of a link, what it leads to."""
    write_lines_whole(path, [text])


def write_lines_whole(path: Path, lines: Iterable[str]) -> None:
    """`write_file_whole` of lines as they come, which need not fit in memory together.

    Until it is whole the file has a name that nothing else has, for what lies beside it may be the user's.

    Args:
        path: The file.
        lines: The lines, each with its end.
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


def unfinished_name(name: str, mark: str) -> str:
    """The name of a file until it is whole.

    Args:
        name: Its own name; of a long one the beginning, since names have a greatest length.
        mark: What tells this writing from others; "*" gives the pattern of what stopped ones left.
    """
    return f".{name[:_MOST_OF_A_NAME]}.{mark}.partial"
