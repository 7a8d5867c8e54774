"""Prompts -> text with a model folder."""

from collections.abc import Sequence

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
    sampler: str = "exact",
    num_draws: int = 200,
    max_draws: int = 200,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stream: bool = False,
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        prompts: Texts to continue, of any lengths; they are written as one batch.
        max_new_tokens: Most tokens of a continuation.
        temperature: 0 to 1; see `calm.core.temperature` for this and the five below.
        sampler: "exact" or "pool".
        num_draws: Pool size of the pool sampler, and of both at temperature 0.
        max_draws: Most draws a chunk of the exact sampler.
        top_p: Share of the pool whose commonest chunks are kept.
        min_p: Least frequency in the pool, as a share of the commonest chunk's.
        seed: Makes the texts repeatable.
        stream: Print the text as it is written (one prompt).

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
            sampler=sampler,
            num_draws=num_draws,
            max_draws=max_draws,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            streamer=streamer,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    new_tokens = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
