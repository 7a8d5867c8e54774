"""Locks that keep a second process out of a folder, released when the holding process ends."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from calm.errors import InputError

LOCK = ".lock"
_UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM)
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextlib.contextmanager
def locked(file: Path, subject: str) -> Iterator[None]:
    """Hold a lock for the duration of the block; its file exists meanwhile.

    If the file cannot be written, neither can the folder, so no lock is needed and none is taken.

    Args:
        file: The lock file, in an existing folder.
        subject: What only one process may work on, for the message.

    Raises:
        InputError: If another process holds it.
    """
    try:
        descriptor = _acquire(file)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        descriptor = -1
    if descriptor is None:
        raise InputError(
            f"another process is working on {subject}{_holder_of(file)}; wait until it ends, or stop it."
        )
    try:
        yield
    finally:
        if descriptor >= 0:
            _release(file, descriptor)


def check_unlocked(run: Path) -> None:
    """Raise InputError if another process is at work in a folder. Not to be called while holding its lock."""
    if (run / LOCK).is_file():
        with locked(run / LOCK, f"the run '{run}'"):
            pass


def _release(file: Path, descriptor: int) -> None:
    """Remove the file, then release the lock."""
    for _ in range(10):
        try:
            with contextlib.suppress(OSError):
                file.unlink()
            with contextlib.suppress(OSError):
                os.close(descriptor)
            return
        except RuntimeError:  # torch's signal handler raises at any point when a data worker has died.
            continue


def _acquire(file: Path) -> int | None:
    """Acquire the lock and return its file descriptor; None if another process holds it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        if not _try_lock(descriptor):
            os.close(descriptor)
            return None
        # The previous holder may have removed the file meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Try to lock a file for this process alone: forked children that outlive it do not keep the lock."""
    try:
        if os.name == "nt":
            import msvcrt  # noqa: PLC0415 (of this system only)

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl  # noqa: PLC0415

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # Some network file systems.
            return True
        raise
    return True


def _holder_of(file: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f" (process {int(file.read_text(encoding='ascii'))})"
    return ""
