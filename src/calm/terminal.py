"""What comes from the command line and goes to it, whatever its encoding and wherever its output leads."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

from calm.errors import InputError

CLOSED_PIPE = 141  # As shells report a process that SIGPIPE ended.
_PIPE_ERRORS = (errno.EPIPE, errno.EINVAL) if os.name == "nt" else (errno.EPIPE,)


def make_output_sturdy() -> None:
    """Let the standard streams of this process take whatever is printed.

    Characters that their encoding lacks are replaced, and streams that are closed lead nowhere. When nobody
    reads the output any more (`calm ... | head -1`), the process ends without a word and with exit code 141.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Else the next file that is opened would take its place.
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if sys.stdout is sys.__stdout__ and type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = _Output.of(sys.stdout)
    if sys.stderr is sys.__stderr__ and type(sys.stderr) is io.TextIOWrapper:
        sys.stderr = _Output.of(sys.stderr)


class _Output(io.TextIOWrapper):
    """A standard stream that ends the process where it cannot be written: nothing can be told any more."""

    @classmethod
    def of(cls, stream: io.TextIOWrapper) -> "_Output":
        """The same stream; it stays open as long as the other."""
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
            self._leave(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> NoReturn:
        # What is left in the buffer is written when the interpreter ends.
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self.fileno())
        if error.errno in _PIPE_ERRORS:
            sys.exit(CLOSED_PIPE)
        print(f"calm: error: the output could not be written ({error.strerror}).", file=sys.stderr)
        sys.exit(1)


def as_text(argument: str) -> str:
    """A text from the command line; where the terminal says that it has no more than ASCII, it is UTF-8.

    Raises:
        InputError: If it is not UTF-8.
    """
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise InputError(f"the text {argument!a} is not UTF-8.") from error
