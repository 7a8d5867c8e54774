"""Prompts with completions -> blocks in which only completions are targets.

Records of .jsonl or .parquet files, or of hub datasets, have either `prompt` and `completion`, or `messages`
(a list of {"role", "content"}). A conversation becomes one example per answer of the assistant: its prompt is
the conversation so far, rendered by the tokenizer's chat template.

Prompts are padded in front, so that the completion starts on a chunk boundary, as in generation:

    [pad pad p1 p2] [p3 p4 p5 p6] | [c1 c2 c3 c4] [EOS pad pad pad]        K = 4
"""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from calm.core.chunks import IGNORED_LABEL
from calm.data.pieces import rank_of
from calm.data.records import load_records
from calm.errors import InputError, reason_of
from calm.text.chat import ASSISTANT, end_of_turn, render
from calm.text.encoding import control_tokens_of, encode_documents, encode_rendering, encode_words
from calm.text.marks import split_at

# For tokenizers without a template of their own. A turn ends with EOS, which no text can spell, so a turn
# cannot fake another one.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_BATCH_SIZE = 1000  # Records that are encoded together.
_ROLE = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn.

    Args:
        prompt: Tokens of the prompt, with BOS if the tokenizer has one.
        completion: Tokens of the completion, ending with an end-of-text token.
        steps: Tokens of the reasoning steps between prompt and completion, if given.
        where: Its location, such as file and line, for messages.
    """

    prompt: list[int]
    completion: list[int]
    steps: tuple[list[int], ...] = ()
    where: str = field(default="an example", compare=False)


def read_examples(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, with_steps: bool = False
) -> list[list[Example]]:
    """Read the examples of each record of files, folders or hub datasets.

    Args:
        sources: The files, folders or datasets.
        tokenizer: The tokenizer.
        with_steps: Whether records have `steps`, a list of texts; missing or null means an empty list. Steps,
            and a completion after steps, are separated from what precedes them by a space.

    Raises:
        InputError: If a source is missing, or a record has neither form.
    """
    conversations = list[list[Example]]()
    for batch in _batches(load_records(sources)):
        conversations += _read_batch(batch, tokenizer, with_steps)
    if not conversations:
        raise InputError(f"there are no examples in {', '.join(sources)}; give a file with records.")
    return conversations


def split_examples(
    conversations: list[list[Example]], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split into training and held-out examples; conversations with the same first prompt stay together.

    Raises:
        InputError: If there are fewer than two different prompts, or `fraction` is not between 0 and 1.
    """
    ranks = [rank_of(str(conversation[0].prompt), seed) for conversation in conversations]
    distinct = sorted(set(ranks))
    if len(distinct) < 2 or not 0 < fraction < 1:
        raise InputError(
            f"{len(distinct)} different prompts cannot be split with validation_fraction {fraction}; give "
            "more, a fraction between 0 and 1, or validation_sources."
        )
    held_out = max(1, min(len(distinct) - 1, round(fraction * len(distinct))))
    sides: tuple[list[Example], list[Example]] = ([], [])
    for conversation, rank in zip(conversations, ranks, strict=True):
        sides[rank <= distinct[held_out - 1]].extend(conversation)
    return sides


class _Pair(NamedTuple):
    """The texts of a record: a prompt, steps, and a completion."""

    prompt: str
    steps: list[str]
    completion: str


def _read_batch(
    batch: Iterable[tuple[str, dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, with_steps: bool
) -> Iterator[list[Example]]:
    """Yield the examples of each record of a batch, encoded together, up to the first invalid record."""
    read: list[tuple[str, _Pair | list[Example]]] = []
    first_error = None
    for where, record in batch:
        try:
            with _with_location(where):
                steps = _steps_of(record) if with_steps else []
                if "messages" in record:
                    read.append((where, list(_answers(_checked_messages(record["messages"]), tokenizer))))
                else:
                    read.append((where, _pair_of(record, steps)))
        except InputError as error:
            first_error = error
            break
    pairs = [pair for _, pair in read if isinstance(pair, _Pair)]
    prompts = iter(encode_documents(tokenizer, [pair.prompt for pair in pairs]))
    tokens = iter(
        encode_words(tokenizer, [text for pair in pairs for text in (*pair.steps, pair.completion)])
    )
    for where, content in read:
        if not isinstance(content, _Pair):
            yield [replace(example, where=where) for example in content]
            continue
        step_ids = tuple(itertools.islice(tokens, len(content.steps)))
        with _with_location(where):
            example = _example(next(prompts), [*next(tokens), tokenizer.eos_token_id])
        yield [replace(example, steps=step_ids, where=where)]
    if first_error is not None:
        raise first_error


def _batches(records: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Batch records: tokenizers are much faster on many texts at once than on one at a time.

    Records before an unreadable one are yielded before its error is raised, so that the first error in the
    order of the records is the one reported.
    """
    is_last = False
    while not is_last:
        batch, reading_error = list[tuple[str, dict[str, Any]]](), None
        try:
            for record in itertools.islice(records, _BATCH_SIZE):
                batch.append(record)  # Not `extend`: records before an error are kept.
        except InputError as error:
            reading_error = error
        yield batch
        if reading_error is not None:
            raise reading_error
        is_last = len(batch) < _BATCH_SIZE


@contextlib.contextmanager
def _with_location(where: str) -> Iterator[None]:
    """Put the location of a record in front of the errors raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _pair_of(record: dict[str, Any], steps: list[str]) -> _Pair:
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise InputError("a record needs 'prompt' and 'completion', both text, or 'messages'.")
    if not completion:
        raise InputError("the completion is empty; leave the record out.")
    return _Pair(prompt, steps, _with_leading_space(completion) if steps else completion)


def _steps_of(record: dict[str, Any]) -> list[str]:
    """The steps of a record, each separated by a space from what precedes it."""
    steps = record.get("steps")
    steps = [] if steps is None else steps  # But an empty string, 0 and the like are mistakes.
    if not isinstance(steps, list) or not all(isinstance(step, str) and step for step in steps):
        raise InputError("'steps' must be a list of texts, none of them empty.")
    if steps and "messages" in record:
        raise InputError("'steps' go with 'prompt' and 'completion', not with 'messages'.")
    return [_with_leading_space(step) for step in steps]


def _with_leading_space(text: str) -> str:
    """A text that continues another, with a space in front unless it starts with whitespace."""
    return text if not text or text[0].isspace() else f" {text}"


def _checked_messages(messages: Any) -> list[dict[str, str]]:
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not is_list or not all(isinstance(message.get("role"), str) for message in messages):
        raise InputError("'messages' must be a list of {'role': text, 'content': text}.")
    if invalid := [m["role"] for m in messages if not _ROLE.fullmatch(m["role"])]:
        raise InputError(f"a role must be one word, such as user or assistant, not {invalid[0][:40]!r}.")
    checked = [
        message | {"content": _text_of(message.get("content"), f"messages[{index}]")}
        for index, message in enumerate(messages)
    ]
    if not any(message["role"] == ASSISTANT for message in checked):
        raise InputError(f"no message has the role '{ASSISTANT}', so there is nothing to learn.")
    return checked


def _text_of(content: Any, where: str) -> str:
    """The content of a message: a string, or a list of text parts as in the OpenAI API."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not texts or len(texts) < len(parts):
        raise InputError(
            f"the content of {where} must be text, or a list of parts {{'type': 'text', 'text': text}}."
        )
    return "".join(texts)


def _answers(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = render(tokenizer, messages[:index], add_generation_prompt=True)
        after = render(tokenizer, messages[: index + 1], add_generation_prompt=False)
        if not after.startswith(before):
            raise InputError(
                "the chat template renders the prompt differently once an answer follows, so the two cannot "
                "be separated; use another template."
            )
        answer, end = _split_off_end(after[len(before) :], messages[:index], tokenizer)
        tokens = encode_rendering(tokenizer, answer, continues=True)
        if end is None:  # What the template adds after an answer cannot be separated from it.
            end = tokenizer.eos_token_id
            tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        yield _example(encode_rendering(tokenizer, before), [*tokens, end])


def _split_off_end(
    rendered: str, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, int | None]:
    """Separate the text of a rendered answer from the token id that ends it.

    If the template closes the turn with a control token, that token ends the answer. If it closes the turn
    with plain text, the answer ends with EOS instead, so that users never see that text.

    Args:
        rendered: The answer as rendered by the template.
        messages: The conversation before it.
        tokenizer: The tokenizer.

    Returns:
        The text and the id; the rendered answer and None if the two cannot be separated.
    """
    suffix = end_of_turn(tokenizer, messages)
    if not suffix or not rendered.endswith(suffix):
        return rendered, None
    text, control = rendered.removesuffix(suffix), control_tokens_of(tokenizer)
    marker = suffix.lstrip()
    first = split_at(marker, control)[:1]
    if first and first[0] in control:
        return text + suffix.removesuffix(marker), control[first[0]]
    return text, tokenizer.eos_token_id


def _example(prompt: list[int], completion: list[int]) -> Example:
    if not prompt:
        raise InputError("the prompt is empty, and the tokenizer has no BOS token.")
    return Example(prompt, completion)


def lay_out(
    examples: Iterable[Example], *, chunk_size: int, block_size: int, pad_token_id: int
) -> tuple[datasets.Dataset, int]:
    """Lay examples out in blocks with the features of `calm.data.chunking`.

    Examples in the same block do not see each other, and none spans two blocks. Long prompts keep their end;
    completions too long for a block keep their beginning.

    Args:
        examples: The examples, in the order in which they are laid out.
        chunk_size: Tokens per chunk K.
        block_size: Tokens per block T, a multiple of K.
        pad_token_id: Id of padding.

    Returns:
        The blocks, and how many examples were shortened.
    """
    rows: dict[str, list[np.ndarray]] = {
        "input_ids": [],
        "labels": [],
        "position_ids": [],
        "document_ids": [],
    }
    room = num_shortened = 0
    for number, example in enumerate(examples):
        prompt, completion = _truncate(example, chunk_size, block_size)
        num_shortened += len(prompt) < len(example.prompt) or len(completion) < len(example.completion)
        front, back = -len(prompt) % chunk_size, -len(completion) % chunk_size
        tokens = np.pad(np.array(prompt + completion), (front, back), constant_values=pad_token_id)
        labels = np.full(len(tokens), IGNORED_LABEL)
        labels[front + len(prompt) :][: len(completion)] = completion
        if len(tokens) > room:
            _start_row(rows, block_size, chunk_size, pad_token_id)
            room = block_size
        start, chunk = block_size - room, (block_size - room) // chunk_size
        rows["input_ids"][-1][start : start + len(tokens)] = tokens
        rows["labels"][-1][start : start + len(tokens)] = labels
        num_chunks = len(tokens) // chunk_size
        rows["position_ids"][-1][chunk : chunk + num_chunks] = np.arange(num_chunks)
        rows["document_ids"][-1][chunk:] = number
        room -= len(tokens)
    return datasets.Dataset.from_dict(rows).with_format("torch"), num_shortened


def _start_row(
    rows: dict[str, list[np.ndarray]], block_size: int, chunk_size: int, pad_token_id: int
) -> None:
    num_chunks = block_size // chunk_size
    rows["input_ids"].append(np.full(block_size, pad_token_id))
    rows["labels"].append(np.full(block_size, IGNORED_LABEL))
    rows["position_ids"].append(np.zeros(num_chunks, dtype=np.int64))
    rows["document_ids"].append(np.zeros(num_chunks, dtype=np.int64))


def _truncate(example: Example, chunk_size: int, block_size: int) -> tuple[list[int], list[int]]:
    """Prompt and completion, shortened to fit in a block when both are padded to whole chunks."""
    completion = example.completion[: block_size - chunk_size]
    room = block_size - len(completion) - (-len(completion) % chunk_size)
    return example.prompt[-room:], completion


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Set a tokenizer's chat template from a file.

    Args:
        tokenizer: The tokenizer.
        path: The file; None keeps the tokenizer's own template, or sets `PLAIN_TEMPLATE` if it has none.

    Raises:
        InputError: If the file cannot be read.
    """
    if path is None:
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
        return
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template '{path}' cannot be read ({reason_of(error)}).") from error
