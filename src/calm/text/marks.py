"""Marks in a text: where words only look like a control token, and where they must not grow into one."""

import re
from collections.abc import Sequence
from typing import Any

# Characters for private use around the number of a marked string; without a number it is a cut.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARK = re.compile(f"{_OPEN}(\\d*){_CLOSE}")


class Marks:
    """Marks words, so that the control tokens in what a chat template makes of them are the template's own.

    Args:
        spellings: How the control tokens are spelled.
    """

    def __init__(self, spellings: Sequence[str]) -> None:
        self._strings = [*spellings, _OPEN]  # The sign itself is marked too: no text can forge a mark.
        self._numbers = {string: number for number, string in enumerate(self._strings)}
        self._any = _pattern_of(self._strings)
        self._beginnings = {spelling[:length] for spelling in spellings for length in range(1, len(spelling))}
        self._longest = max(map(len, self._beginnings), default=0)

    def mark(self, value: Any) -> Any:
        """A text, or lists and dictionaries of texts, with marks.

        A text that ends like the beginning of a control token gets a cut there: what comes after it could
        complete the token.
        """
        if isinstance(value, dict):
            return {key: self.mark(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.mark(one) for one in value]
        if not isinstance(value, str):
            return value
        marked = self._any.sub(lambda found: f"{_OPEN}{self._numbers[found[0]]}{_CLOSE}", value)
        ends = (marked[-length:] for length in range(1, min(self._longest, len(marked)) + 1))
        return marked + _OPEN + _CLOSE if any(end in self._beginnings for end in ends) else marked

    def unmark(self, text: str) -> str:
        """The words again."""
        return _MARK.sub(lambda found: self._strings[int(found[1])] if found[1] else "", text)


def is_marked(text: str) -> bool:
    """Whether there is any mark in a text."""
    return _MARK.search(text) is not None


def replace_all(text: str, names: dict[str, str]) -> str:
    """A text with other names for some strings, the longest first."""
    return _pattern_of(list(names)).sub(lambda found: names[found[0]], text) if names else text


def split_at(text: str, strings: Sequence[str] | dict[str, int]) -> list[str]:
    """A text in parts: some strings, the longest first, and what lies between them."""
    parts = re.split(f"({_pattern_of(list(strings)).pattern})", text) if strings else [text]
    return [part for part in parts if part]


def _pattern_of(strings: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))))
