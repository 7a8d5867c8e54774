"""How well a CALM chooses the true continuation of a text among others, with and without its likelihood.

    python benchmarks/choosing.py MODEL... --text valid.jsonl.xz --questions 200 --data runs/a/data

Each question is the beginning of a passage and four continuations of as many words: the true one and three
from elsewhere in the same text. A CALM chooses by its likelihood, if its head has one; by agreement, the
share of drawn tokens that are those of the continuation; and by the energy score of drawn latents
(`calm.harness`). A Transformer chooses by its likelihood, and so do n-gram models of the training text of a
prepared folder (`--data`). Chance is 25%. Wilson intervals are for 95%.

Some continuations are likely, or agree with draws, whatever was before them. So each way is asked a second
time about the score less that of the same continuation after "Chapter I." (pointwise mutual information, as
Holtzman et al. 2021, arXiv 2104.08315, do with likelihoods). Times are of both together.
"""

import argparse
import json
import lzma
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from measure import machine
from scipy.stats import binomtest
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calm.data.prepared import load_prepared
from calm.evaluation.held_out import ngram_models
from calm.evaluation.ngram import NGramSampler
from calm.harness import HarnessModel
from calm.models.calm import CalmForCausalLM
from calm.models.language_model import language_model
from calm.models.loading import load_language_model_and_tokenizer

NUM_CHOICES, ORDERS = 4, (3, 5)
NOTHING_BEFORE = "Chapter I."
Scores = Callable[[list[tuple[str, str]]], list[float]]
"""How likely continuations are after their contexts, or whatever orders them."""


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
    parser.add_argument("models", nargs="*", help="folders of models")
    parser.add_argument("--data", type=Path, help="prepared text that n-grams are counted in")
    parser.add_argument("--text", type=Path, required=True, help="held-out text, JSON lines, may be packed")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--words", type=int, nargs=2, default=[80, 12], help="of context and of a choice")
    parser.add_argument("--draws", type=int, nargs="+", default=[16, 64, 256], help="of each chunk")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    context, length = arguments.words
    asked = questions_of(arguments.text, arguments.questions, context, length, arguments.seed)
    print(f"{len(asked)} questions; {machine()}\n")
    print("| model | by | draws | right | less what is right anywhere | ms a question |\n" + "|---" * 6 + "|")
    every = [way for name in arguments.models for way in ways_of(name, arguments.draws, arguments.seed)]
    every += ngrams_of(arguments.data) if arguments.data else []
    for label, scores in every:
        begun, right, right_by_contrast = time.perf_counter(), 0, 0
        for one in asked:
            found = torch.tensor(scores([(one.context, text) for text in one.choices]))
            anywhere = torch.tensor(scores([(NOTHING_BEFORE, text) for text in one.choices]))
            right += is_first_best(found)
            right_by_contrast += is_first_best(found - anywhere)
        took = (time.perf_counter() - begun) / len(asked)
        shares = " | ".join(share(number, len(asked)) for number in (right, right_by_contrast))
        print(f"| {label} | {shares} | {1000 * took:.0f} |", flush=True)


def is_first_best(scores: Tensor) -> bool:
    """Whether the first choice, which is the true one, has a higher score than every other."""
    return bool((scores[0] > scores[1:]).all())


def share(right: int, asked: int) -> str:
    """In percent, with its Wilson interval."""
    low, high = binomtest(right, asked).proportion_ci(method="wilson")
    return f"{right / asked:.1%} ({low:.0%} to {high:.0%})"


def ways_of(name: str, all_draws: list[int], seed: int) -> Iterator[tuple[str, Scores]]:
    """Ways of choosing that a model has, each with its number of draws."""
    model, tokenizer = load_language_model_and_tokenizer(name)
    if not isinstance(model, CalmForCausalLM):
        yield f"{name} | likelihood |", by_harness(HFLM(pretrained=model, tokenizer=tokenizer))
        return
    if language_model(model).has_likelihood:
        yield f"{name} | likelihood |", by_harness(HarnessModel(name))
    for way in ("agreement", "energy"):
        for draws in all_draws:
            chooser = HarnessModel(name, choices=way, num_draws=draws, seed=seed)
            yield f"{name} | {way} | {draws}", by_harness(chooser)


def by_harness(model: LM) -> Scores:
    """The scores of a model class of the harness."""

    def scores(pairs: list[tuple[str, str]]) -> list[float]:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=place)
            for place, pair in enumerate(pairs)
        ]
        return [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]

    return scores


def ngrams_of(folder: Path) -> Iterator[tuple[str, Scores]]:
    """Log-likelihoods of n-gram models."""
    data = load_prepared(folder)
    for name, model in ngram_models(ORDERS, data, chunk_size=1):

        def scores(pairs: list[tuple[str, str]], model: NGramSampler = model) -> list[float]:
            return [log_likelihood(model, data.tokenizer, *pair) for pair in pairs]

        yield f"{name} model | likelihood |", scores


def log_likelihood(
    model: NGramSampler, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> float:
    """Of a continuation by an n-gram model."""
    begun, whole = tokenizer([context, context + continuation], add_special_tokens=False)["input_ids"]
    return model.log_probability(whole, len(begun))


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


if __name__ == "__main__":
    main()
