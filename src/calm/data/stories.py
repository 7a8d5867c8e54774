"""The embedded corpus: short stories generated from a seed, each with its own plot, people and things.

A story picks its names, places and objects at the start and keeps them to the end, so a model must track
them; plot, sentences and words are random. A seed gives the same stories on every machine and Python version.
"""

import bisect
import itertools
import json
import random
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TypeVar

from calm.core.seeds import as_seed
from calm.data import lexicon

T = TypeVar("T")

_PRONOUNS = {
    "girl": {"he": "she", "him": "her", "his": "her"},
    "boy": {"he": "he", "him": "him", "his": "his"},
}
NUM_STORIES = 3_300  # In the corpus of the demo and of ladders.
_RANDOM_BITS = 53
_MIN_WEIGHT = 1e-3  # So that every word occurs often enough in a few thousand stories to be learned.
_VOWEL_SOUNDS = ("a", "e", "i", "o", "u", "honest", "hour")


def stories(seed: int = 0, num_stories: int | None = None) -> Iterator[str]:
    """Generate stories.

    Args:
        seed: Seed of the sequence; story i of a seed is always the same text.
        num_stories: How many; None for an endless sequence.

    Yields:
        Stories of 12 to 14 beats, each on one line.
    """
    seed = as_seed(seed)
    indices = itertools.count() if num_stories is None else range(num_stories)
    for index in indices:
        yield write_story(random.Random(f"{seed}/{index}"))


def write_stories(path: Path, seed: int, num_stories: int) -> None:
    """Write stories to a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": story}) + "\n" for story in stories(seed, num_stories))


def write_story(rng: random.Random) -> str:
    """Generate one story."""
    slots = _cast(rng)
    (openings,), (endings,), *plots = _plots()
    beats = [openings, *_choose(rng, plots, skew=False), endings]
    sentences = [_choose(rng, beat) for beat in beats]
    return " ".join(_sentence(template.format_map(slots)) for template in sentences)


def _cast(rng: random.Random) -> dict[str, str]:
    """Choose people, places and things: a value for every slot that the plots use."""
    child, friend_child = _choose(rng, ["girl", "boy"], skew=False), _choose(rng, ["girl", "boy"], skew=False)
    names = {"girl": lexicon.GIRLS, "boy": lexicon.BOYS}
    hero = _choose(rng, names[child])
    thing, thing2 = _choose_two(rng, lexicon.THINGS)
    place, place2 = _choose_two(rng, lexicon.PLACES)
    food, food2 = _choose_two(rng, lexicon.FOODS)
    mood, mood2 = _choose_two(rng, lexicon.MOODS)
    pronouns, friend_pronouns = _PRONOUNS[child], _PRONOUNS[friend_child]
    return {
        "child": child,
        "hero": hero,
        **pronouns,
        **{key.capitalize(): word.capitalize() for key, word in pronouns.items()},
        "friend_child": friend_child,
        "friend": _choose(rng, [name for name in names[friend_child] if name != hero]),
        "their": friend_pronouns["his"],
        "elder": f"{_choose(rng, ['Mrs.', 'Mr.'])} {_choose(rng, lexicon.SURNAMES)}",
        "town": _choose(rng, lexicon.TOWN_STARTS, skew=False) + _choose(rng, lexicon.TOWN_ENDS, skew=False),
        "thing": thing,
        "thing2": thing2,
        "place": place,
        "place2": place2,
        "food": food,
        "food2": food2,
        "mood": mood,
        "mood2": mood2,
        "animal": _choose(rng, lexicon.ANIMALS),
        "pet": _choose(rng, lexicon.PET_NAMES),
        "color": _choose(rng, lexicon.COLORS),
        "look": _choose(rng, lexicon.LOOKS),
        "adverb": _choose(rng, lexicon.ADVERBS),
        "job": _choose(rng, lexicon.JOBS),
        "relative": _choose(rng, lexicon.RELATIVES),
        "tree": _choose(rng, lexicon.TREES),
        "flower": _choose(rng, lexicon.FLOWERS),
        "weather": _choose(rng, lexicon.WEATHERS),
        "day": _choose(rng, lexicon.DAYS),
        "month": _choose(rng, lexicon.MONTHS),
        "time": _choose(rng, lexicon.TIMES),
        "number": _choose(rng, lexicon.NUMBERS),
        "sound": _choose(rng, lexicon.SOUNDS),
    }


def _sentence(text: str) -> str:
    """Turn "a apple" into "an apple", and capitalize the first letter."""
    words = text.split(" ")
    for i, word in enumerate(words[:-1]):
        if word.strip('"') in ("a", "A") and words[i + 1].lower().startswith(_VOWEL_SOUNDS):
            words[i] = word + "n"
    text = " ".join(words)
    start = 1 if text[0] == '"' else 0
    return text[:start] + text[start].upper() + text[start + 1 :]


def _choose_two(rng: random.Random, words: list[str]) -> tuple[str, str]:
    first = _choose(rng, words)
    return first, _choose(rng, [word for word in words if word != first])


def _choose(rng: random.Random, items: list[T], skew: bool = True) -> T:
    """Choose an item. With skew, the r-th has weight 1/(r + 1)^2 + 1/1000: few are common, many rare."""
    # Python guarantees the same stream in every version only for getrandbits.
    uniform = rng.getrandbits(_RANDOM_BITS) / 2**_RANDOM_BITS
    if not skew:
        return items[int(uniform * len(items))]
    cumulative = _zipf(len(items))
    return items[bisect.bisect_right(cumulative, uniform * cumulative[-1])]


@cache
def _plots() -> list[list[list[str]]]:
    """Openings, endings, and the plots: lists of beats, each a list of sentences to choose from."""
    text = resources.files("calm.data").joinpath("plots.txt").read_text(encoding="utf-8")
    _, *sections = text.split("== ")
    return [
        [beat.splitlines() for beat in section.partition("\n")[2].strip().split("\n\n")]
        for section in sections
    ]


@cache
def _zipf(size: int) -> list[float]:
    return list(itertools.accumulate(1 / rank**2 + _MIN_WEIGHT for rank in range(2, size + 2)))
