"""Prompts -> text with a model folder."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from calm.errors import InputError
from calm.models.calm import CalmForCausalLM


def continue_texts(
    model: CalmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.5,
    seed: int | None = None,
    stream: bool = False,
    **sampling: Any,
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        prompts: Texts to continue, of any lengths; they are written as one batch.
        max_new_tokens: Most tokens of a continuation.
        temperature: 0 to 1.
        seed: Makes the texts repeatable.
        stream: Print the text as it is written (one prompt).
        **sampling: Further arguments of `CalmForCausalLM.generate`: `sampler`, `num_draws`, ...

    Raises:
        InputError: If an argument is out of range.
    """
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    try:
        output = model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            streamer=streamer,
            **sampling,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    new_tokens = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
