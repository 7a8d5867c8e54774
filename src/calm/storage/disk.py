"""What a disk does to a program: full, failing, read-only; and files that are written whole."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from calm.errors import InputError, RunError, reason_of

_ERRORS_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)
_WORDS_OF_TORCH = ("PytorchStreamWriter", "unexpected pos", "iostream error")


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
