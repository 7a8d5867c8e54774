"""Prompts -> text, with any language model."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from calm.errors import InputError
from calm.models.context import check_room, longest_context, remaining_context
from calm.models.generation.arguments import num_texts
from calm.models.generation.generate import DEFAULT_MAX_NEW_TOKENS
from calm.models.language_model import language_model
from calm.models.thoughts import num_tokens_of
from calm.text.decoding import TextBuilder, decode_after
from calm.text.encoding import encode_documents

logger = logging.getLogger(__name__)


def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_return_sequences: int = 1,
    stream: bool = False,
    **arguments: Any,
) -> list[str]:
    """The continuations of each prompt, without the prompt; those of the same prompt are adjacent.

    Args:
        model: A CALM, or another causal language model, which samples from its probabilities.
        tokenizer: Its tokenizer.
        prompts: Texts to continue, of any lengths; they are generated as one batch.
        num_return_sequences: Continuations per prompt.
        stream: Print prompts and continuations as they are generated, one after another.
        **arguments: Arguments of `continue_tokens`.

    Raises:
        InputError: If an argument is out of range, or a prompt has no tokens or is too long.
    """
    try:
        num_texts(num_return_sequences)
    except ValueError as error:
        raise InputError(str(error)) from error
    if stream:
        return _stream_texts(model, tokenizer, prompts, num_return_sequences, arguments)
    ids = encode_documents(tokenizer, prompts)
    new_tokens = continue_tokens(
        model, tokenizer, ids, num_return_sequences=num_return_sequences, **arguments
    )
    repeated = [prompt for prompt in ids for _ in range(num_return_sequences)]
    return [
        decode_after(tokenizer, prompt, new)
        for prompt, new in zip(repeated, new_tokens.tolist(), strict=True)
    ]


def _stream_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    num_return_sequences: int,
    arguments: dict[str, Any],
) -> list[str]:
    if num_return_sequences > 1:
        raise InputError("streaming shows one text at a time; ask for one sample per prompt.")
    texts = []
    for number, prompt in enumerate(prompts):
        if number:
            print(flush=True)
        [ids] = encode_documents(tokenizer, [prompt])
        listener = TextListener(tokenizer, show_at_once, prompt)
        new = continue_tokens(model, tokenizer, [ids], streamer=listener, **arguments)
        print(flush=True)
        texts.append(decode_after(tokenizer, ids, new[0].tolist()))
    return texts


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int | None = None,
    at_most: int = DEFAULT_MAX_NEW_TOKENS,
    temperature: float = 0.5,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    crop: bool = False,
    num_thoughts: int | None = None,
    stop_strings: Sequence[str] = (),
    **sampling: Any,
) -> Tensor:
    """`continue_texts` for prompts of token ids: the new tokens (B, S), padded after the end of each text.

    Args:
        model: A CALM, or another causal language model, which samples from its probabilities.
        tokenizer: Its tokenizer.
        prompts: Token ids to continue.
        max_new_tokens: Maximum tokens of a continuation, which must fit in the context.
        at_most: Maximum tokens if `max_new_tokens` is not given; fewer if the context ends first, and at most
            half of the context after a prompt that is cropped.
        temperature: 0 to 1.
        seed: Makes the texts reproducible.
        streamer: Gets the prompt, then new tokens as they are generated (one prompt only).
        crop: Keep the end of a prompt that is too long for the context; without this, it is an error.
        num_thoughts: Thoughts after each prompt; None for as many as the model was trained with.
        stop_strings: Strings that end a continuation, which includes them.
        **sampling: Further arguments of `CalmForCausalLM.generate`: `sampler`, `num_draws`, ... Of these,
            other models use only `top_p` and `min_p`; they also take `draft` and `draft_chunks`.

    Raises:
        InputError: If an argument is out of range, or a prompt has no tokens or is too long.
    """
    if not all(prompts):
        raise InputError("a prompt is empty, and the tokenizer has no BOS token; give a text.")
    thought_tokens = _tokens_of_thoughts(model, num_thoughts)
    longest = max(map(len, prompts))
    if max_new_tokens is None:
        room = remaining_context(model.config, longest + thought_tokens)
        if crop and room == 0:
            room = (remaining_context(model.config, 1 + thought_tokens) or 0) // 2
        max_new_tokens = at_most if room is None else max(1, min(at_most, room))
    if crop:
        prompts = crop_prompts(model, prompts, max_new_tokens + thought_tokens)
        longest = max(map(len, prompts))
    # Padding goes on the left: a token-level model continues from the last column.
    batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    batch = batch.to(model.device)
    if stop_strings:
        sampling |= {"stop_strings": list(stop_strings), "tokenizer": tokenizer}
    try:
        check_room(model.config, longest, max_new_tokens, thought_tokens)
        output = language_model(model).generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            streamer=streamer,
            num_thoughts=num_thoughts,
            **sampling,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    return output[:, batch["input_ids"].shape[1] :]


def _tokens_of_thoughts(model: PreTrainedModel, number: int | None) -> int:
    try:
        return num_tokens_of(language_model(model).thoughts(number), model.config)
    except ValueError as error:
        raise InputError(str(error)) from error


def crop_prompts(model: PreTrainedModel, prompts: Sequence[list[int]], budget: int) -> list[list[int]]:
    """The end of each prompt, as much as fits in the context with `budget` more tokens; log what is cropped.

    Raises:
        InputError: If the context has no room for a prompt beside these tokens.
    """
    room = remaining_context(model.config, budget)
    if room is None:
        return list(prompts)
    if room < 1:
        raise InputError(
            f"{budget} new tokens leave no room for a prompt in the context of "
            f"{longest_context(model.config)} tokens; ask for fewer."
        )
    if cropped := sum(len(prompt) > room for prompt in prompts):
        logger.warning(
            "%d of %d prompts cropped from the left to their last %d tokens; %d more fit in the context.",
            cropped,
            len(prompts),
            room,
            budget,
        )
    return [prompt[-room:] for prompt in prompts]


class TextListener(BaseStreamer):
    """Streamer that shows one text as it is generated, each part once it can no longer change.

    Args:
        tokenizer: The tokenizer.
        show: Called with each part of the text.
        prompt: Shown first, once the streamer has received the prompt's tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], object], prompt: str = ""
    ) -> None:
        self._tokenizer, self._show, self._prompt = tokenizer, show, prompt
        self._builder: TextBuilder | None = None
        self.tokens: list[int] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        """Receive the prompt in the first call, then new tokens."""
        tokens = value.flatten().tolist()
        if self._builder is None:
            self._builder = TextBuilder(self._tokenizer, prompt=tokens)
            if self._prompt:
                self._show(self._prompt)
        else:
            self.tokens += tokens
            self._append(self._builder.add(tokens))

    def end(self) -> None:
        """Show the rest of the text."""
        assert self._builder is not None
        self._append(self._builder.add([], is_last=True))

    def _append(self, text: str) -> None:
        self.text += text
        self._show(text)


show_at_once: Callable[[str], None] = partial(print, end="", flush=True)
"""Prints a part of a text at once, not only when its line ends."""
