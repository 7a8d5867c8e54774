"""Conversations about small stories, to fine-tune a model that can be chatted with.

    python examples/conversations.py conversations.jsonl
    calm finetune --recipe full --model stories --examples.sources conversations.jsonl --output runs/chat
    calm serve runs/chat/model

The stories are those of the embedded corpus, from seeds that no model of the package was trained on.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from calm.data.stories import stories

_CHILD = re.compile(r"a (\w+) (boy|girl) (?:named|called) (\w+)")
_SENTENCE = re.compile(r"\S.*?[.!?]\"?(?=\s|$)")
_ASKS_FOR_A_STORY = (
    "Tell me a story about a {child} named {name}.",
    "Please tell me about {name}, a {child}.",
)
_ASKS_FOR_MORE = ("And then?", "What happened next?", "Go on, please.")
_ABOUT = (
    ("Who is the story about?", "It is about {name}, a {kind} {child}."),
    ("What kind of {child} is {name}?", "{name} is a {kind} {child}."),
)


def conversations(seed: int) -> Iterator[list[dict[str, str]]]:
    """Conversations without end, each of three questions with their answers, about another story."""
    rng = random.Random(seed)
    for story in stories(2_000_000 + seed):
        if found := _CHILD.search(story):
            kind, child, name = found.groups()
            words = {"kind": kind, "child": child, "name": name}
            sentences = _SENTENCE.findall(story)
            first, more = " ".join(sentences[:5]), " ".join(sentences[5:9])
            asks, answers = rng.choice(_ABOUT)
            turns = [
                (rng.choice(_ASKS_FOR_A_STORY), first),
                (rng.choice(_ASKS_FOR_MORE), more),
                (asks, answers),
            ]
            yield [
                {"role": role, "content": said.format(**words)}
                for turn in turns
                for role, said in zip(("user", "assistant"), turn, strict=True)
            ]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--number", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with Path(arguments.output).open("x", encoding="utf-8") as file:
        for messages in islice(conversations(arguments.seed), arguments.number):
            file.write(json.dumps({"messages": messages}) + "\n")
    print(f"{arguments.output}: {arguments.number} conversations")


if __name__ == "__main__":
    main()
