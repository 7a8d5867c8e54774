"""Long documents -> parts, cut between paragraphs where there are any.

A text that is a single paragraph is cut at the ends of lines, failing that at the ends of sentences, then at
spaces, and as a last resort anywhere. Joined again, the parts are exactly the text.

Where a part ends depends on the text at that point, so two versions of a text are mostly cut into the same
parts.
"""

import re
import zlib
from collections.abc import Iterator, Sequence

_END_OF_LINE = r"(?:\r\n|\n|\r(?!\n))"
_REST_OF_LINE = r"[^\S\r\n]*"
# From coarse to fine. A border lies after a pattern's match, so whitespace belongs to the text before it.
_BORDERS = (
    re.compile(rf"(?<=\S){_REST_OF_LINE}{_END_OF_LINE}(?:{_REST_OF_LINE}{_END_OF_LINE})+"),  # Blank lines.
    re.compile(rf"(?<=\S){_REST_OF_LINE}{_END_OF_LINE}(?:{_REST_OF_LINE}{_END_OF_LINE})*"),
    re.compile(  # Ends of sentences, in Chinese and Japanese too.
        r"""[.!?\u2026]["'\u201d\u2019\u00bb)\]]*\s+|[\u3002\uff01\uff1f]["'\u201d\u2019\u300d\u300f\uff09]*\s*"""
    ),
    re.compile(r"(?<=\S)\s+"),
)
_LINES = _BORDERS[1]
# Bytes. A unit longer than the second, or longer than both the first and half of the text, is not taken for a
# paragraph but for text without blank lines.
_PARAGRAPH, _LONGEST_PARAGRAPH = 4000, 20_000


def parts_of(text: str, size: int) -> list[str]:
    """Cut a text into parts of about `size` bytes; a shorter text is one part.

    If the text consists mainly of paragraphs, none is cut, even if it is longer than a part.

    Args:
        text: A document.
        size: Maximum bytes of a part, unless a single paragraph is longer.
    """
    total = len(text.encode())
    if total <= size:
        return [text]
    most = max(longest_part(size), min(_LONGEST_PARAGRAPH, total // 2))
    units = _units(text, size, most, _BORDERS)
    if len(units) == 1:
        units = _cut(text, _LINES)  # A short text without blank lines.
    parts: list[str] = []
    waiting: list[str] = []
    room = size
    for unit in units:
        length = len(unit.encode())
        if waiting and length > room:
            parts.append("".join(waiting))
            waiting, room = [], size
        waiting.append(unit)
        room -= length
        if 2 * room < size and _is_landmark(unit, 2 * length / size):
            parts.append("".join(waiting))
            waiting, room = [], size
    return [*parts, "".join(waiting)] if waiting else parts


def longest_part(size: int) -> int:
    """Bytes of the longest part that may be held out, if parts have about `size` bytes."""
    return max(2 * size, _PARAGRAPH)


def _units(text: str, size: int, most: int, borders: Sequence[re.Pattern[str]]) -> list[str]:
    """Split a text into the coarsest units that put at least half of it in units of at most `most` bytes."""
    if not borders:
        return list(_slices(text, max(1, size // 4)))
    units = _cut(text, borders[0])
    lengths = [len(unit.encode()) for unit in units]
    if sum(length for length in lengths if length > most) <= sum(lengths) / 2:
        return units
    finer: list[str] = []
    for unit, length in zip(units, lengths, strict=True):
        finer += _units(unit, size, most, borders[1:]) if length > most else [unit]
    return finer


def _cut(text: str, border: re.Pattern[str]) -> list[str]:
    """Cut a text after each border."""
    ends = [match.end() for match in border.finditer(text)]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _is_landmark(unit: str, share: float) -> bool:
    """Whether a hash of the unit's text selects it; about a `share` of all units is selected."""
    return zlib.crc32(unit.encode()) < share * 2**32


def _slices(text: str, length: int) -> Iterator[str]:
    for start in range(0, len(text), length):
        yield text[start : start + length]
