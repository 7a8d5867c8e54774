"""How well does a CALM pick the true continuation of a text among four, with and without a likelihood?

    python benchmarks/choosing.py MODEL... --text valid.jsonl.xz --questions 200 --data runs/a/data

Each question is the beginning of a passage and four continuations of the same number of words: the true one
and three from elsewhere in the same text. A CALM chooses by its likelihood, if its head has one; by
agreement, the share of drawn tokens that equal those of the continuation; and by the energy score of drawn
latents (`calm.harness`). A Transformer chooses by its likelihood, and so do n-gram models of the training
text of a prepared folder (`--data`). Chance is 25%; the intervals are 95% Wilson intervals.

Some continuations score well whatever precedes them. So each model also chooses by the score minus that of
the same continuation after "Chapter I." (pointwise mutual information, as Holtzman et al. 2021, arXiv
2104.08315, do with likelihoods). Times include both.
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
NEUTRAL_CONTEXT = "Chapter I."
Score = Callable[[list[tuple[str, str]]], list[float]]
"""Pairs of context and continuation -> their scores; a more plausible continuation scores higher."""


class Question(NamedTuple):
    """A passage to be continued.

    Args:
        context: The beginning of the passage.
        choices: Its continuations, the true one first.
    """

    context: str
    choices: list[str]


def main() -> None:
    """Ask all questions in all ways, and print a table."""
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
    questions = read_questions(arguments.text, arguments.questions, context, length, arguments.seed)
    print(f"{len(questions)} questions; {machine()}\n")
    print("| model | by | draws | right | less what is right anywhere | ms a question |\n" + "|---" * 6 + "|")
    scorers = [
        scorer for name in arguments.models for scorer in scorers_of(name, arguments.draws, arguments.seed)
    ]
    scorers += ngram_scorers(arguments.data) if arguments.data else []
    for label, score in scorers:
        start, num_right, num_right_by_contrast = time.perf_counter(), 0, 0
        for question in questions:
            scores = torch.tensor(score([(question.context, text) for text in question.choices]))
            baseline = torch.tensor(score([(NEUTRAL_CONTEXT, text) for text in question.choices]))
            num_right += is_first_best(scores)
            num_right_by_contrast += is_first_best(scores - baseline)
        seconds = (time.perf_counter() - start) / len(questions)
        shares = " | ".join(share(count, len(questions)) for count in (num_right, num_right_by_contrast))
        print(f"| {label} | {shares} | {1000 * seconds:.0f} |", flush=True)


def is_first_best(scores: Tensor) -> bool:
    """Whether the first choice, which is the true one, has a higher score than every other."""
    return bool((scores[0] > scores[1:]).all())


def share(num_right: int, num_questions: int) -> str:
    """The share of right answers in percent, with its Wilson interval."""
    low, high = binomtest(num_right, num_questions).proportion_ci(method="wilson")
    return f"{num_right / num_questions:.1%} ({low:.0%} to {high:.0%})"


def scorers_of(name: str, all_draws: list[int], seed: int) -> Iterator[tuple[str, Score]]:
    """All ways in which a model can score continuations, each with its label."""
    model, tokenizer = load_language_model_and_tokenizer(name)
    if not isinstance(model, CalmForCausalLM):
        yield f"{name} | likelihood |", harness_scorer(HFLM(pretrained=model, tokenizer=tokenizer))
        return
    if language_model(model).has_likelihood:
        yield f"{name} | likelihood |", harness_scorer(HarnessModel(name))
    for criterion in ("agreement", "energy"):
        for num_draws in all_draws:
            chooser = HarnessModel(name, choices=criterion, num_draws=num_draws, seed=seed)
            yield f"{name} | {criterion} | {num_draws}", harness_scorer(chooser)


def harness_scorer(model: LM) -> Score:
    """Scores by a model class of the harness."""

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
            for index, pair in enumerate(pairs)
        ]
        return [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]

    return score


def ngram_scorers(folder: Path) -> Iterator[tuple[str, Score]]:
    """Log-likelihoods of n-gram models."""
    data = load_prepared(folder)
    for name, model in ngram_models(ORDERS, data, chunk_size=1):

        def score(pairs: list[tuple[str, str]], model: NGramSampler = model) -> list[float]:
            return [log_likelihood(model, data.tokenizer, *pair) for pair in pairs]

        yield f"{name} model | likelihood |", score


def log_likelihood(
    model: NGramSampler, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> float:
    """Log-probability of a continuation by an n-gram model."""
    context_ids, ids = tokenizer([context, context + continuation], add_special_tokens=False)["input_ids"]
    return model.log_probability(ids, len(context_ids))


def read_questions(file: Path, number: int, context: int, length: int, seed: int) -> list[Question]:
    """Questions about random passages; the wrong continuations are those of other questions."""
    open_text: Callable[..., Any] = lzma.open if file.suffix == ".xz" else open
    with open_text(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].split() for line in lines]
    rng = random.Random(seed)
    passages = [
        (text, start) for text in texts for start in range(0, len(text) - context - length, context + length)
    ]
    chosen = rng.sample(passages, number)
    pairs = [
        (
            " ".join(words[start : start + context]),
            " " + " ".join(words[start + context : start + context + length]),
        )
        for words, start in chosen
    ]
    endings = [ending for _, ending in pairs]
    return [
        Question(
            beginning, [ending, *rng.sample([other for other in endings if other != ending], NUM_CHOICES - 1)]
        )
        for beginning, ending in pairs
    ]


if __name__ == "__main__":
    main()
