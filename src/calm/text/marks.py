"""Marks in a text: where plain text only looks like a control token, and where it must not complete one."""

import re
from collections.abc import Sequence
from typing import Any

# Private-use characters around the number of a marked string; without a number, a cut.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARK = re.compile(f"{_OPEN}(\\d*){_CLOSE}")


class Marks:
    """Marks plain text, so that all control tokens in a chat template's output are the template's own.

    Args:
        spellings: Texts of the control tokens.
    """

    def __init__(self, spellings: Sequence[str]) -> None:
        self._strings = [*spellings, _OPEN]  # The marker itself is marked too, so no text can forge a mark.
        self._numbers = {string: number for number, string in enumerate(self._strings)}
        self._pattern = _pattern_of(self._strings)
        self._beginnings = {spelling[:length] for spelling in spellings for length in range(1, len(spelling))}
        self._longest = max(map(len, self._beginnings), default=0)

    def mark(self, value: Any) -> Any:
        """Add marks to a text, or to all texts in lists and dictionaries.

        A text that ends with the start of a control token gets a cut there: what follows could
        complete the token.
        """
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if not isinstance(value, str):
            return value
        marked = self._pattern.sub(lambda match: f"{_OPEN}{self._numbers[match[0]]}{_CLOSE}", value)
        suffixes = (marked[-length:] for length in range(1, min(self._longest, len(marked)) + 1))
        return marked + _OPEN + _CLOSE if not self._beginnings.isdisjoint(suffixes) else marked

    def unmark(self, text: str) -> str:
        """Restore the original text."""
        return _MARK.sub(lambda match: self._strings[int(match[1])] if match[1] else "", text)


def is_marked(text: str) -> bool:
    """Whether a text contains any mark."""
    return _MARK.search(text) is not None


def replace_all(text: str, names: dict[str, str]) -> str:
    """Replace strings in a text by their names, longest match first."""
    return _pattern_of(list(names)).sub(lambda match: names[match[0]], text) if names else text


def split_at(text: str, strings: Sequence[str] | dict[str, int]) -> list[str]:
    """Split a text into occurrences of some strings, longest match first, and what lies between them."""
    parts = re.split(f"({_pattern_of(list(strings)).pattern})", text) if strings else [text]
    return [part for part in parts if part]


def _pattern_of(strings: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))))
