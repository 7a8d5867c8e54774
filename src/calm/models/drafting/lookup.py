"""Drafts copied from the text itself: what came after the same tokens before.

Known as prompt lookup (Saxena, github.com/apoorvumang/prompt-lookup-decoding). Texts that repeat themselves,
and prompts that are quoted, are drafted for nothing.
"""

from collections.abc import Sequence

MOST, LONGEST = 10, 40
"""Tokens that are copied, at most; twice as many after a copy that was kept whole, up to the longest."""


class Lookup:
    """Finds where the end of one text stood before.

    Args:
        length: Tokens at the end that must be the same; 0 finds nothing.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._ends: dict[tuple[int, ...], int] = {}  # Of tokens that something followed: where that began.
        self._seen = length
        self._copied: tuple[int, list[int]] = (0, [])  # Where the last copy was put, and what it was.
        self._most = MOST

    def draft(self, text: Sequence[int], most: int) -> Sequence[int]:
        """What followed the last tokens where they stood last, again and again; nothing if they are new.

        Args:
            text: All tokens so far. Of a text that was seen before, tokens are only added.
            most: Tokens of the draft, at most.
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
        # What repeats itself may be shorter than the copy, which then repeats it again.
        period = len(text) - begin
        self._copied = len(text), [text[begin + number % period] for number in range(min(most, self._most))]
        return self._copied[1]
