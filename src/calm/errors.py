"""The one exception for mistakes that a user can mend: the command line prints it as a sentence."""


class InputError(ValueError):
    """Bad input: says what is wrong, which value, and what to do, in one sentence."""
