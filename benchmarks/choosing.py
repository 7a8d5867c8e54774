"""How well a CALM chooses the true continuation of a text among others, with and without its likelihood.

    python benchmarks/choosing.py MODEL --text valid.jsonl.xz --questions 200

Each question is the beginning of a passage and four continuations of as many words: the true one and three
from elsewhere in the same text. The model chooses by its likelihood, if its head has one; by agreement, the
share of drawn tokens that are those of the continuation; and by the energy score of drawn latents
(`calm.harness`). Chance is 25%. Wilson intervals are for 95%.
"""

import argparse
import json
import lzma
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from measure import machine
from scipy.stats import binomtest

from calm.harness import HarnessModel
from calm.models.language_model import language_model
from calm.models.loading import load_language_model_and_tokenizer

NUM_CHOICES = 4


class Question(NamedTuple):
    """A passage to go on with.

    Args:
        context: Its beginning.
        choices: Continuations, the true one first.
    """

    context: str
    choices: list[str]


def main() -> None:
    """Ask all questions in each way; print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="folders of models")
    parser.add_argument("--text", type=Path, required=True, help="held-out text, JSON lines, may be packed")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--words", type=int, nargs=2, default=[80, 12], help="of context and of a choice")
    parser.add_argument("--draws", type=int, nargs="+", default=[16, 64, 256], help="of each chunk")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    context, length = arguments.words
    asked = questions_of(arguments.text, arguments.questions, context, length, arguments.seed)
    print(f"{len(asked)} questions; {machine()}\n")
    print("| model | by | draws | right | 95% | seconds a question |\n|---|---|---|---|---|---|")
    for name in arguments.models:
        for way, draws in ways_of(name, arguments.draws):
            model = HarnessModel(name, choices=way or "refuse", num_draws=draws, seed=arguments.seed)
            begun = time.perf_counter()
            right = sum(choose(model, one) == 0 for one in asked)
            seconds = (time.perf_counter() - begun) / len(asked)
            low, high = binomtest(right, len(asked)).proportion_ci(method="wilson")
            print(
                f"| {name} | {way or 'likelihood'} | {draws if way else ''} | {right / len(asked):.1%} "
                f"| {low:.0%} to {high:.0%} | {seconds:.2f} |",
                flush=True,
            )


def ways_of(name: str, all_draws: list[int]) -> list[tuple[Any, int]]:
    """Ways of choosing that a model has, each with its number of draws."""
    model, _ = load_language_model_and_tokenizer(name)
    sampled = [(way, draws) for way in ("agreement", "energy") for draws in all_draws]
    return [(None, 1)] * language_model(model).has_likelihood + sampled


def questions_of(file: Path, number: int, context: int, length: int, seed: int) -> list[Question]:
    """Questions about passages at random places; the other continuations are of other questions."""
    read: Callable[..., Any] = lzma.open if file.suffix == ".xz" else open
    with read(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].split() for line in lines]
    rng = random.Random(seed)
    places = [
        (text, start) for text in texts for start in range(0, len(text) - context - length, context + length)
    ]
    chosen = rng.sample(places, number)
    pairs = [
        (
            " ".join(words[start : start + context]),
            " " + " ".join(words[start + context : start + context + length]),
        )
        for words, start in chosen
    ]
    endings = [ending for _, ending in pairs]
    return [
        Question(begun, [ending, *rng.sample([one for one in endings if one != ending], NUM_CHOICES - 1)])
        for begun, ending in pairs
    ]


def choose(model: HarnessModel, question: Question) -> int:
    """The place of the continuation with the highest score; the last of equal ones, which is a wrong one."""
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(question.context, one), idx=place)
        for place, one in enumerate(question.choices)
    ]
    scores = [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]
    return max(range(len(scores)), key=lambda place: (scores[place], place))


if __name__ == "__main__":
    main()
