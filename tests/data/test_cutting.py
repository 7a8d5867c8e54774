"""Long texts are cut between paragraphs, or at finer boundaries if they have none; no text is lost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.data.cutting import longest_part, parts_of
from calm.data.stories import stories

PARAGRAPHS = list(dict.fromkeys(stories(0, 300)))
LETTERS = "".join(random.Random(0).choices("abcdefghij", k=50_000))


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(
        st.sampled_from(
            ["a", "bc ", "d. ", "e.\n", "\n", "\r\n", "\r", "\n\n", " \n\t\n", "é。", "日本", "🎈"]
        )
    ),
    st.integers(1, 40),
)
def test_joined_parts_are_the_text(pieces, size):
    text = "".join(pieces)
    parts = parts_of(text, size)
    assert "".join(parts) == text
    assert parts == parts_of(text, size)
    assert all(part.strip() for part in parts) or not text.strip()
    if len(text.encode()) <= size:
        assert parts == [text]


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.lists(st.integers(1, 3900), min_size=20, max_size=60),
    st.sampled_from(["\n\n", "\r\n\r\n", "\n \t\n", "\n\n\n\n", "\r\r"]),
    st.integers(1, 30_000),
)
def test_no_paragraph_is_cut(lengths, blank_line, size):
    fillers = (
        f"{number} of several words. On two lines:\n".ljust(length, "x")
        for number, length in enumerate(lengths)
    )
    paragraphs = [
        filler[: max(len(str(number)) + 1, length)].strip()
        for number, (filler, length) in enumerate(zip(fillers, lengths, strict=True))
    ]
    parts = parts_of(blank_line.join(paragraphs), size)
    assert [paragraph for part in parts for paragraph in part.strip().split(blank_line)] == paragraphs
    assert max(len(part) for part in parts) <= max(size, *map(len, paragraphs)) + len(blank_line)


TEXTS = {
    "lines": ("\n".join(PARAGRAPHS), "\n"),
    "CRLF": ("\r\n".join(PARAGRAPHS), "\r\n"),
    "lines under a title": ("A title\n\n" + "\n".join(PARAGRAPHS), "\n"),
    "chapters": (
        "\n\n\n".join("\n".join(PARAGRAPHS[start : start + 50]) for start in range(0, 300, 50)),
        "\n",
    ),
    "sentences": (" ".join(PARAGRAPHS), (". ", "! ", '" ', "? ")),
    "Chinese": ("这是一个句子。" * 5000, "。"),
    "words": (" ".join(LETTERS[start : start + 5] for start in range(0, len(LETTERS), 5)), " "),
    "letters": (LETTERS, tuple("abcdefghij")),
}


@pytest.mark.parametrize(("text", "boundary"), TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("size", [1000, 5000])
def test_text_without_paragraphs_is_cut_at_the_next_best_boundaries(text, boundary, size):
    parts = parts_of(text, size)
    assert "".join(parts) == text
    assert all(part.endswith(boundary) for part in parts[:-1])
    assert max(len(part.encode()) for part in parts) <= size
    assert len(parts) < 4 * len(text.encode()) / size


def test_one_overlong_paragraph_among_many_stays_whole():
    overlong = LETTERS[:30_000]
    paragraphs = [*PARAGRAPHS[:100], overlong, *PARAGRAPHS[100:]]
    parts = parts_of("\n\n".join(paragraphs), 2000)
    assert overlong in [part.strip() for part in parts]
    assert len(overlong) > longest_part(2000)


@pytest.mark.parametrize("text", ["word", "one line of a few words", "A sentence. Another one!", "", "   "])
def test_a_short_line_is_not_cut(text):
    assert parts_of(text, 1) == [text]


def test_edited_text_is_mostly_cut_as_before():
    """Otherwise most of what one version holds out would be trained on in the other."""
    paragraphs = list(stories(1, 1000))
    changed = ["A new beginning.", *paragraphs[:300], "Something new.", *paragraphs[302:]]
    before = set(parts_of("\n\n".join(paragraphs), 4000))
    after = set(parts_of("\n\n".join(changed), 4000))
    assert len(before) > 180 and len(after - before) < 15
