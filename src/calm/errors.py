"""The one exception for mistakes that a user can mend: the command line prints it as a sentence."""


class InputError(ValueError):
    """Bad input: says what is wrong, which value, and what to do, in one sentence."""


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or its name if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
