"""Prompts -> text with a model folder."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from calm.core.temperature import inverse_temperature
from calm.errors import InputError
from calm.models.calm import CalmForCausalLM


def continue_texts(
    model: PreTrainedModel,
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
        model: A CALM, or another causal language model, which writes with its probabilities.
        tokenizer: Its tokenizer.
        prompts: Texts to continue, of any lengths; they are written as one batch.
        max_new_tokens: Most tokens of a continuation.
        temperature: 0 to 1.
        seed: Makes the texts repeatable.
        stream: Print the text as it is written (one prompt).
        **sampling: Further arguments of `CalmForCausalLM.generate`: `sampler`, `num_draws`, ... Of these
            another model uses `top_p` and `min_p` only.

    Raises:
        InputError: If an argument is out of range.
    """
    ids = tokenizer(list(prompts))["input_ids"]
    new_tokens = continue_tokens(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stream=stream,
        **sampling,
    )
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True)


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.5,
    seed: int | None = None,
    stream: bool = False,
    **sampling: Any,
) -> Tensor:
    """`continue_texts` for prompts of token ids: new tokens (B, S), padded behind their end.

    Raises:
        InputError: If an argument is out of range.
    """
    # Padding goes in front: a model of tokens goes on from the last column.
    batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    batch = batch.to(model.device)
    write = model.generate if isinstance(model, CalmForCausalLM) else _tokens_of(model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    try:
        output = write(
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
    return output[:, batch["input_ids"].shape[1] :]


def _tokens_of(model: PreTrainedModel) -> Callable[..., Tensor]:
    """`generate` of a model of tokens, with the arguments that a CALM has."""

    def write(
        input_ids: Tensor,
        *,
        temperature: float,
        seed: int | None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        sampler: str | None = None,
        num_draws: int = 0,
        max_draws: int = 0,
        **arguments: Any,
    ) -> Tensor:
        if sampler in ("pool", "head"):
            raise InputError(
                f"the {sampler} sampler is for models without probabilities; leave out --sampler."
            )
        inverse_temperature(temperature)  # Raises where it lies outside 0 to 1.
        if temperature > 0:
            arguments |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
            arguments |= {"min_p": min_p} if min_p else {}
        else:
            arguments["do_sample"] = False
        # transformers draws from the global generator: leave that as it was.
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            generate: Any = model.generate
            return generate(input_ids, **arguments)

    return write
