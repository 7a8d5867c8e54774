"""Scores of a fine-tuned model: its loss on held-out examples, and its answers to their prompts."""

from collections.abc import Callable, Sequence

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.examples import Example
from calm.models.context import remaining_context
from calm.models.language_model import language_model
from calm.progress import track
from calm.text.decoding import decode_after
from calm.texts import continue_tokens

_ANSWERS_AT_ONCE = 16


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    temperature: float,
    num_draws: int,
    seed: int,
    max_new_tokens: int | None = None,
) -> list[str]:
    """Generate an answer to the prompt of each example.

    Args:
        model: A CALM, or another causal language model.
        tokenizer: Its tokenizer.
        examples: The examples.
        temperature: 0 to 1.
        num_draws: Size of the pool at temperature 0, for heads that cannot decode greedily.
        seed: Makes the answers reproducible.
        max_new_tokens: Maximum tokens of an answer, capped by the room in the context; None for the length of
            the longest completion.
    """
    answers = []
    if max_new_tokens is None:
        max_new_tokens = max((len(example.completion) for example in examples), default=0)
    if (room := remaining_context(model.config, 1)) is not None:
        max_new_tokens = min(max_new_tokens, room)
    for start in track(range(0, len(examples), _ANSWERS_AT_ONCE), "answering", "batch"):
        prompts = [example.prompt for example in examples[start : start + _ANSWERS_AT_ONCE]]
        tokens = continue_tokens(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            num_draws=num_draws if temperature == 0 else None,
            crop=True,
        )
        pairs = zip(prompts, tokens.tolist(), strict=True)
        answers += [decode_after(tokenizer, prompt, generated) for prompt, generated in pairs]
    return answers


def exact_match(answers: Sequence[str], completions: Sequence[str]) -> float:
    """Percent of answers that equal the completion, ignoring leading and trailing whitespace."""
    pairs = list(zip(answers, completions, strict=True))
    return 100 * sum(answer.strip() == completion.strip() for answer, completion in pairs) / len(pairs)


def ends_with_completion(answers: Sequence[str], completions: Sequence[str]) -> float:
    """Percent of answers whose last words are the completion, whatever steps precede them."""
    pairs = [(answer.split(), end.split()) for answer, end in zip(answers, completions, strict=True)]
    return 100 * sum(words[-len(end) :] == end for words, end in pairs) / len(pairs)


def metric_of_answers(
    *, may_begin_with_steps: bool
) -> tuple[str, Callable[[Sequence[str], Sequence[str]], float]]:
    """The metric of answers: its name, and the function that computes it from answers and completions.

    Args:
        may_begin_with_steps: Whether answers may show their steps before the completion.
    """
    if may_begin_with_steps:
        return "ends_with_completion", ends_with_completion
    return "exact_match", exact_match


def completions_of(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The completions of examples as text."""
    return [decode_after(tokenizer, example.prompt, example.completion) for example in examples]


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: datasets.Dataset, num_blocks: int) -> float:
    """Mean loss per target, with the same noise on every call.

    Args:
        model: A CALM, or another causal language model.
        blocks: Blocks of examples.
        num_blocks: Maximum number of blocks to score.
    """
    view, total, count = language_model(model), 0.0, 0
    generator = torch.Generator(model.device).manual_seed(0)
    blocks = blocks.select(range(min(num_blocks, len(blocks))))
    for block in track(blocks.iter(batch_size=1), "scoring the loss", "block", total=len(blocks)):
        batch = {name: block[name].to(model.device) for name in ("input_ids", "labels", "position_ids")}
        loss, targets = view.loss(**batch, generator=generator)
        if targets:
            total, count = total + float(loss) * targets, count + targets
    return total / max(1, count)
