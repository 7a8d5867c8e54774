"""Conversations -> token ids, by the chat template of a tokenizer.

Only the template produces control tokens. The content of messages is plain text, whatever it looks like.
"""

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from calm.errors import InputError, reason_of
from calm.text.encoding import control_tokens_of, encode_rendering, marks_of
from calm.text.marks import split_at

ASSISTANT = "assistant"
_PLACEHOLDER = "\ue0f4"  # Stands for an answer, to see what a template puts after one.


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool
) -> str:
    """Render a conversation with the template, marking the plain text in it (see `calm.text.encoding`).

    Args:
        tokenizer: The tokenizer, with a chat template.
        messages: Messages, each with `role` and `content`.
        add_generation_prompt: Whether to add the prompt for an answer of the assistant.

    Raises:
        InputError: If the template rejects the messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            marks_of(tokenizer).mark(list(messages)),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"the chat template does not accept these messages ({reason_of(error)}).") from error
    assert isinstance(text, str)
    return text


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Tokens of a conversation, up to the start of the assistant's answer.

    Raises:
        InputError: If the template rejects the messages.
    """
    return encode_rendering(tokenizer, render(tokenizer, messages, add_generation_prompt=True))


def end_of_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]] = ()) -> str:
    """What the template puts after an answer of the assistant; "" if unknown.

    Args:
        tokenizer: The tokenizer, with or without a chat template.
        messages: The messages before the answer; by default, a short question.
    """
    question = list(messages) or [{"role": "user", "content": "?"}]
    if tokenizer.chat_template is None:
        return ""
    try:
        text = render(
            tokenizer, [*question, {"role": ASSISTANT, "content": _PLACEHOLDER}], add_generation_prompt=False
        )
    except InputError:
        return ""
    return text.partition(_PLACEHOLDER)[2] if text.count(_PLACEHOLDER) == 1 else ""


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token with which the template ends an answer, if it uses one."""
    control = control_tokens_of(tokenizer)
    parts = split_at(end_of_turn(tokenizer).lstrip(), control)
    return control.get(parts[0]) if parts else None
