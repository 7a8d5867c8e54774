"""Long documents -> parts, cut between paragraphs where there are any.

A text that is a single paragraph is cut at the ends of lines, failing that at the ends of sentences, then at
spaces, and as a last resort anywhere. Joined again, the parts are exactly the text.

Where a part ends depends on the text at that point, so two versions of a text are mostly cut into the same
parts.
"""

import re
import zlib
from collections.abc import Iterator, Sequence

_LINE_END = r"(?:\r\n|\n|\r(?!\n))"
_SPACES = r"[^\S\r\n]*"
# From coarse to fine. A text is cut at the end of a match, so whitespace belongs to what precedes it.
_BOUNDARIES = (
    re.compile(rf"(?<=\S){_SPACES}{_LINE_END}(?:{_SPACES}{_LINE_END})+"),  # Blank lines.
    re.compile(rf"(?<=\S){_SPACES}{_LINE_END}(?:{_SPACES}{_LINE_END})*"),
    re.compile(  # Ends of sentences, in Chinese and Japanese too.
        r"""[.!?\u2026]["'\u201d\u2019\u00bb)\]]*\s+|[\u3002\uff01\uff1f]["'\u201d\u2019\u300d\u300f\uff09]*\s*"""
    ),
    re.compile(r"(?<=\S)\s+"),
)
_LINES = _BOUNDARIES[1]
_LONG_PARAGRAPH = 4000  # Bytes: a shorter unit may always be a paragraph.
_LONGEST_PARAGRAPH = 20_000  # Bytes: a longer one is text without blank lines; so is one over half the text.


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
    max_unit = max(longest_part(size), min(_LONGEST_PARAGRAPH, total // 2))
    units = _split_units(text, size, max_unit, _BOUNDARIES)
    if len(units) == 1:
        units = _cut(text, _LINES)  # A short text without blank lines.
    parts: list[str] = []
    current: list[str] = []
    room = size
    for unit in units:
        length = len(unit.encode())
        if current and length > room:
            parts.append("".join(current))
            current, room = [], size
        current.append(unit)
        room -= length
        if 2 * room < size and _is_landmark(unit, 2 * length / size):
            parts.append("".join(current))
            current, room = [], size
    return [*parts, "".join(current)] if current else parts


def longest_part(size: int) -> int:
    """Bytes of the longest part that may be held out, if parts have about `size` bytes."""
    return max(2 * size, _LONG_PARAGRAPH)


def _split_units(text: str, size: int, max_unit: int, boundaries: Sequence[re.Pattern[str]]) -> list[str]:
    """Split a text into the coarsest units such that units of at most `max_unit` bytes hold half of it."""
    if not boundaries:
        return list(_slices(text, max(1, size // 4)))
    units = _cut(text, boundaries[0])
    lengths = [len(unit.encode()) for unit in units]
    if sum(length for length in lengths if length > max_unit) <= sum(lengths) / 2:
        return units
    finer: list[str] = []
    for unit, length in zip(units, lengths, strict=True):
        finer += _split_units(unit, size, max_unit, boundaries[1:]) if length > max_unit else [unit]
    return finer


def _cut(text: str, boundary: re.Pattern[str]) -> list[str]:
    """Cut a text after each boundary."""
    ends = [match.end() for match in boundary.finditer(text)]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _is_landmark(unit: str, share: float) -> bool:
    """Whether a hash of the unit's text selects it; about a `share` of all units is selected."""
    return zlib.crc32(unit.encode()) < share * 2**32


def _slices(text: str, length: int) -> Iterator[str]:
    for start in range(0, len(text), length):
        yield text[start : start + length]
