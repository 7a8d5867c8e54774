"""Exceptions that the command line prints as a sentence."""


class InputError(ValueError):
    """Bad input: says what is wrong, which value, and what to do, in one sentence."""


class RunError(RuntimeError):
    """A run that cannot go on through no mistake of its input: says why, and what is left of it."""


class Terminated(RunError):
    """A run that was asked to end (SIGTERM) and has kept its state."""


def cause_of(error: BaseException) -> str:
    """The last line of what an exception says: where libraries that validate put the cause."""
    text = str(error).strip()
    return text.splitlines()[-1].strip() if text else type(error).__name__


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or its name if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
