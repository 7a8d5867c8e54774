"""Prompt lookup: drafts copied from the text itself, from what followed the same tokens earlier.

After Saxena (github.com/apoorvumang/prompt-lookup-decoding). Repetitive text, and quotations from the prompt,
are drafted at no cost.
"""

from collections.abc import Sequence

INITIAL_LENGTH, MAX_LENGTH = 10, 40
"""Maximum number of copied tokens: at first, and after doubling for each copy that was accepted in full."""


class Lookup:
    """Finds earlier occurrences of the last tokens of one text.

    Args:
        num_matching: Tokens at the end that must match; 0 finds nothing.
    """

    def __init__(self, num_matching: int) -> None:
        self._num_matching = num_matching
        self._following: dict[tuple[int, ...], int] = {}  # Tokens -> index of what followed them last.
        self._next_index = num_matching  # The first one that is not in `_following` yet.
        self._last_copy: tuple[int, list[int]] = (0, [])  # Its index in the text if accepted, and its tokens.
        self._copy_length = INITIAL_LENGTH

    def draft(self, text: Sequence[int], max_length: int) -> Sequence[int]:
        """What followed the last tokens at their latest earlier occurrence, repeated; empty if they are new.

        Args:
            text: All tokens so far; between calls, tokens may only be appended.
            max_length: Maximum number of draft tokens.
        """
        if self._num_matching == 0 or len(text) < self._num_matching:
            return ()
        for index in range(self._next_index, len(text)):
            self._following[tuple(text[index - self._num_matching : index])] = index
        self._next_index = max(self._next_index, len(text))
        source = self._following.get(tuple(text[-self._num_matching :]))
        if source is None:
            return ()
        start, last = self._last_copy
        was_accepted = len(last) == self._copy_length and list(text[start : start + len(last)]) == last
        self._copy_length = min(2 * self._copy_length, MAX_LENGTH) if was_accepted else INITIAL_LENGTH
        # What follows may be shorter than the copy, which then repeats it.
        period, length = len(text) - source, min(max_length, self._copy_length)
        copy = [text[source + offset % period] for offset in range(length)]
        self._last_copy = len(text), copy
        return copy
