"""Exceptions that the command line prints as a sentence."""

_LONGEST_SENTENCE = 2000
_MOST_OF_A_VALUE = 100
_MOST_CHARACTERS = 400  # Of what another library says: it may repeat the whole of its input.


class InputError(ValueError):
    """Bad input: says what is wrong, which value, and what to do, in one sentence.

    Of a long one the middle is left out: names and values in it come from files that are not trusted.
    """

    def __init__(self, message: str = "") -> None:
        if len(message) > _LONGEST_SENTENCE:
            half = _LONGEST_SENTENCE // 2
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)


class NotFiniteError(InputError):
    """Numbers of a model are not finite: its weights are damaged, diverged, or too large for the dtype."""


class RunError(RuntimeError):
    """A run that cannot go on through no mistake of its input: says why, and what is left of it."""


class Terminated(RunError):
    """A run that was asked to end (SIGTERM) and has kept its state."""


def shown(value: object) -> str:
    """A value as a message repeats it: not all of a long one."""
    text = repr(value)
    return text if len(text) <= _MOST_OF_A_VALUE else f"{text[:_MOST_OF_A_VALUE]}..."


def cause_of(error: BaseException) -> str:
    """The last line of what an exception says: where libraries that validate put the cause."""
    return _line_of(error, -1)


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or its name if it says nothing."""
    return _line_of(error, 0)


def _line_of(error: BaseException, place: int) -> str:
    text = str(error).strip()
    line = text.splitlines()[place].strip() if text else type(error).__name__
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}..."
