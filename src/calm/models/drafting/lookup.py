"""Prompt lookup: drafts copied from the text itself, from what followed the same tokens earlier.

After Saxena (github.com/apoorvumang/prompt-lookup-decoding). Repetitive text, and quotations from the prompt,
are drafted at no cost.
"""

from collections.abc import Sequence

MOST, LONGEST = 10, 40
"""Maximum number of copied tokens. It doubles after a copy that was accepted in full, up to the longest."""


class Lookup:
    """Finds earlier occurrences of the end of one text.

    Args:
        length: Tokens at the end that must match; 0 finds nothing.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._ends: dict[tuple[int, ...], int] = {}  # Last tokens -> index of what followed them.
        self._seen = length
        self._copied: tuple[int, list[int]] = (0, [])  # Index and tokens of the last copy.
        self._most = MOST

    def draft(self, text: Sequence[int], most: int) -> Sequence[int]:
        """What followed the last tokens at their latest earlier occurrence, repeated; empty if they are new.

        Args:
            text: All tokens so far; between calls, tokens may only be appended.
            most: Maximum number of draft tokens.
        """
        if self._length == 0 or len(text) < self._length:
            return ()
        for end in range(self._seen, len(text)):
            self._ends[tuple(text[end - self._length : end])] = end
        self._seen = max(self._seen, len(text))
        begin = self._ends.get(tuple(text[-self._length :]))
        if begin is None:
            return ()
        first, copied = self._copied
        is_kept = len(copied) == self._most and list(text[first : first + len(copied)]) == copied
        self._most = min(2 * self._most, LONGEST) if is_kept else MOST
        # The period may be shorter than the copy, which then repeats it.
        period = len(text) - begin
        self._copied = len(text), [text[begin + number % period] for number in range(min(most, self._most))]
        return self._copied[1]
