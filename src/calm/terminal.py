"""Text from and to the command line, whatever its encoding and wherever its output goes."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

from calm.errors import InputError

CLOSED_PIPE = 141  # As shells report a process killed by SIGPIPE.
_PIPE_ERRORS = (errno.EPIPE, errno.EINVAL) if os.name == "nt" else (errno.EPIPE,)


def make_streams_robust() -> None:
    """Make the standard streams of this process accept whatever is printed.

    Characters that their encoding lacks are replaced, and closed streams become the null device. When nobody
    reads the output any more (`calm ... | head -1`), the process ends silently with exit code 141.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Else the next file that is opened would take its descriptor.
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if sys.stdout is sys.__stdout__ and type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = _Output.of(sys.stdout)
    if sys.stderr is sys.__stderr__ and type(sys.stderr) is io.TextIOWrapper:
        sys.stderr = _Output.of(sys.stderr)


class _Output(io.TextIOWrapper):
    """A standard stream that ends the process when it cannot be written to."""

    @classmethod
    def of(cls, stream: io.TextIOWrapper) -> "_Output":
        """Wrap a stream; the result stays open as long as that stream."""
        stream.flush()
        return cls(
            stream.buffer,
            encoding=stream.encoding,
            errors="replace" if stream.errors in ("strict", "surrogateescape") else stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._exit(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._exit(error)

    def _exit(self, error: OSError) -> NoReturn:
        # The rest of the buffer is written at interpreter exit, and has to go somewhere.
        with Path(os.devnull).open("w", encoding="utf-8") as null_device:
            os.dup2(null_device.fileno(), self.fileno())
        if error.errno in _PIPE_ERRORS:
            sys.exit(CLOSED_PIPE)
        print(f"calm: error: the output could not be written ({error.strerror}).", file=sys.stderr)
        sys.exit(1)


def as_text(argument: str) -> str:
    """A text from the command line, read as UTF-8 even if the locale says ASCII.

    Raises:
        InputError: If it is not UTF-8.
    """
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise InputError(f"the text {argument!a} is not UTF-8.") from error
