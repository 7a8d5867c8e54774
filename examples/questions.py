"""Examples for fine-tuning: questions about small stories, with answers that the stories give.

    python examples/questions.py questions.jsonl --number 4000
    calm finetune --recipe full --model runs/demo/model --examples.sources questions.jsonl --output runs/qa

The stories are those of the embedded corpus, from seeds that `calm demo` does not train on.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from calm.data.stories import stories

# Pattern of what a story tells, question, and which group of the pattern answers it.
QUESTIONS = (
    (r"(boy|girl) (?:named|called) (\w+)", "Who is the story about?", 2),
    (r"(boy|girl) (?:named|called) (\w+)", "Is it about a boy or a girl?", 1),
    (r"a (\w+) (?:boy|girl) (?:named|called)", "What kind of child is it?", 1),
)


def questions(number: int, seed: int) -> Iterator[dict[str, str]]:
    """So many records with prompt and completion, each about another story."""
    rng = random.Random(seed)
    for story in islice(stories(1_000_000 + seed, 2 * number), 2 * number):
        pattern, question, group = rng.choice(QUESTIONS)
        if found := re.search(pattern, story):
            yield {"prompt": f"{story}\nQuestion: {question}\nAnswer:", "completion": f" {found[group]}"}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--number", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    records = list(islice(questions(arguments.number, arguments.seed), arguments.number))
    with Path(arguments.output).open("x", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    print(f"{arguments.output}: {len(records)} questions")


if __name__ == "__main__":
    main()
