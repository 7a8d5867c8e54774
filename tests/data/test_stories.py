"""The embedded corpus: repeatable, pinned, varied, disjoint between seeds, and without leftover templates."""

import hashlib
import re
import string
from functools import cache
from importlib import resources
from itertools import islice

import pytest

from calm.data import lexicon
from calm.data.stories import stories

NAMES = {"girl": set(lexicon.GIRLS), "boy": set(lexicon.BOYS)}
ALL_NAMES = NAMES["girl"] | NAMES["boy"]
LISTS = {name: words for name, words in vars(lexicon).items() if isinstance(words, list)}
PLOTS = resources.files("calm.data").joinpath("plots.txt").read_text(encoding="utf-8")
TEMPLATES = [line for line in PLOTS.splitlines() if line and not line.startswith(("#", "=="))]


@cache
def corpus(seed: int, num_stories: int) -> list[str]:
    return list(stories(seed, num_stories))


def names_in(story: str) -> list[str]:
    """Names of children in the order of the text."""
    return [word for word in re.findall(r"[A-Z][a-z]+", story) if word in ALL_NAMES]


def test_same_seed_same_text():
    assert list(stories(3, 50)) == list(stories(3, 50))


def test_a_shorter_run_is_a_prefix_of_a_longer_one():
    longer = list(stories(5, 40))
    assert list(stories(5, 7)) == longer[:7]
    assert list(islice(stories(5), 40)) == longer  # Without a number there is no end.
    assert list(stories(5, 0)) == []


def test_stories_of_two_seeds_differ_at_every_number():
    assert all(a != b for a, b in zip(corpus(0, 10_000), corpus(1, 2_000), strict=False))


def test_the_corpus_is_pinned():
    """If these values change, the corpus has changed, and all figures in the docs must be measured again."""
    assert corpus(0, 10_000)[1] == (
        "Igor was a brave boy who lived near the farm. It was a sunny evening in July. He was at the "
        'farm with Tom. Then they heard a creak far away, and a storm began. "We must go home!" said '
        "Tom. But the bridge was gone, and the water was rising. They found an old tower and closed the "
        "door. Inside it was dark, but Igor had an old trumpet. Something went creak in the corner. It "
        'was only a red vole, cold and afraid. "Do not be afraid," he said quickly to the vole. At '
        "evening the storm was over, and the sun came out. Their families were glad to see them, and "
        "the vole stayed with Igor. From that day on, Igor and Tom were the best of friends."
    )
    digest = hashlib.sha256("\n".join(corpus(0, 10_000)).encode()).hexdigest()
    assert digest == "410dbeecfc5e291ed30900054ffe62188d2f4d5ba87785145239210b62253379"


def test_there_are_a_few_thousand_distinct_words():
    words = {word for story in corpus(0, 10_000) for word in re.findall(r"[A-Za-z']+", story)}
    assert len(words) >= 2000


def test_no_story_occurs_twice_or_for_another_seed():
    first = corpus(0, 10_000)
    assert len(set(first)) == len(first)
    assert set(first).isdisjoint(corpus(1, 2_000))


def test_every_sentence_of_the_plots_is_used():
    """So none names a slot that does not exist, and parsing loses none."""
    sample = corpus(0, 10_000)[:3000]
    assert len(TEMPLATES) > 200
    for template in TEMPLATES:
        parts = re.split(r"\{\w+\}", template)
        pattern = r"[\w' .-]+?".join(re.escape(part).replace(r"\ a\ ", r"\ an?\ ") for part in parts)
        longest = max((piece for part in parts for piece in part.split(" a ")), key=len)
        assert any(longest in story and re.search(pattern, story, re.I) for story in sample), template


def test_hero_keeps_the_name_through_the_story():
    repeated = 0
    for story in corpus(0, 10_000)[:3000]:
        hero, *others = names_in(story)
        repeated += hero in others
        assert len({hero, *others}) <= 2, story  # The hero and a friend: nobody else has a first name.
    assert repeated > 2800  # The other stories go on with pronouns only.


def test_child_and_pronouns_fit_the_hero():
    """Stories that name one child hold only the pronouns of that child."""
    other_pronouns = {"girl": {"he", "him", "his"}, "boy": {"she", "her", "hers"}}
    checked = set()
    for story in corpus(0, 10_000)[:3000]:
        names = set(names_in(story))
        if len(names) == 1:
            child = "girl" if names < NAMES["girl"] else "boy"
            assert not other_pronouns[child] & set(re.findall(r"[a-z]+", story.lower())), story
            checked.add(child)
    assert checked == {"girl", "boy"}


def test_every_slot_is_filled_and_each_story_is_one_clean_line():
    for story in corpus(0, 10_000):
        assert not set(story) - set(string.ascii_letters + ' .,!?"-'), story
        assert "  " not in story and story == story.strip(), story
        assert story[0].isupper() and story.count('"') % 2 == 0, story


def test_articles_fit_the_next_word():
    """ "an" before a vowel, "a" before a consonant, by sound: an honest girl, an hourglass."""
    vowel, silent_h = "aeiouAEIOU", ("honest", "hour")
    wrong = {
        f"{article} {word}"
        for story in corpus(0, 10_000)
        for article, word in re.findall(r'\b([Aa]n?) "?([A-Za-z]+)', story)
        if (word[0] in vowel or word.startswith(silent_h)) != (article.lower() == "an")
    }
    assert not wrong


@pytest.mark.parametrize("name", sorted(LISTS))
def test_lexicon_lists_hold_no_word_twice(name):
    words = LISTS[name]
    assert words and len(set(words)) == len(words)


def test_names_of_girls_boys_and_others_do_not_overlap():
    """Girl or boy must be known from the name; no pet, month, day or surname has a child's name."""
    assert not NAMES["girl"] & NAMES["boy"]
    assert not ALL_NAMES & {*lexicon.PET_NAMES, *lexicon.SURNAMES, *lexicon.MONTHS, *lexicon.DAYS}


def test_no_template_is_listed_twice():
    assert len(set(TEMPLATES)) == len(TEMPLATES)
