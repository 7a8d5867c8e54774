"""Exceptions that the command line prints as a sentence."""

_LONGEST_SENTENCE = 2000
_LONGEST_VALUE = 100
_LONGEST_LINE = 400  # Of another library's message, which may repeat its whole input.


class InputError(ValueError):
    """Bad input. The message is one sentence: what is wrong, which value, and what to do.

    The middle of a long message is cut out, since names and values in it come from untrusted files.
    """

    def __init__(self, message: str = "") -> None:
        if len(message) > _LONGEST_SENTENCE:
            half = _LONGEST_SENTENCE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)


class NotFiniteError(InputError):
    """A model gave NaN or infinity: its weights are damaged, diverged, or too large for the dtype."""


class RunError(RuntimeError):
    """A run failed though its input is valid. The message says why, and what is left of the run."""


class Terminated(RunError):
    """A run was asked to stop (SIGTERM) and has saved its state."""


def shown(value: object) -> str:
    """A value as messages quote it, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def cause_of(error: BaseException) -> str:
    """The last line of an exception's message, where validation libraries put the cause."""
    return _line_of(error, -1)


def reason_of(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return _line_of(error, 0)


def _line_of(error: BaseException, index: int) -> str:
    text = str(error).strip()
    line = text.splitlines()[index].strip() if text else type(error).__name__
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."
