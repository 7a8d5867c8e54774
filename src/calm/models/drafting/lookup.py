"""Drafts copied from the text itself: what came after the same tokens before.

Known as prompt lookup (Saxena, github.com/apoorvumang/prompt-lookup-decoding). Texts that repeat themselves,
and prompts that are quoted, are drafted for nothing.
"""

from collections.abc import Sequence

MOST = 10
"""Tokens that are copied, at most."""


class Lookup:
    """Finds where the end of one text stood before.

    Args:
        length: Tokens at the end that must be the same; 0 finds nothing.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._ends: dict[tuple[int, ...], int] = {}  # Of tokens that something followed: where that began.
        self._seen = length

    def draft(self, text: Sequence[int], most: int) -> Sequence[int]:
        """What followed the last tokens where they stood last; nothing if they are new.

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
        return () if begin is None else text[begin : begin + min(most, MOST)]
