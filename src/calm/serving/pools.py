"""What could come next: draws of the next chunk, how often each, and what temperature makes of them."""

import secrets
from collections import Counter
from collections.abc import Generator
from typing import Any

import torch

from calm.core.random import DrawsInParts, generators_of_rows
from calm.core.temperature import distribution_of_pool
from calm.models.calm import CalmForCausalLM
from calm.models.writing.prompts import Prompt
from calm.serving.endpoint import Endpoint
from calm.serving.engine import QueueFullError
from calm.serving.errors import ApiError
from calm.serving.protocol import PoolRequest
from calm.serving.readers import IsGone, unless_gone
from calm.serving.request_texts import of_queue
from calm.text.decoding import spell_tokens

_DRAWS_AT_ONCE = 64  # Between two steps of the texts that are being written.


async def describe_pool(
    endpoint: Endpoint, request: PoolRequest, most_draws: int, seconds: float, is_gone: IsGone
) -> dict[str, Any]:
    """The most frequent draws of the chunk after a prompt and what was written after it.

    Args:
        endpoint: Whose model and tokenizer.
        request: What is asked.
        most_draws: Draws that the server allows.
        seconds: How long it may take.
        is_gone: Whether whoever asked has left.

    Raises:
        ApiError: If the request cannot be honoured, or takes too long.
    """
    endpoint.check_name(request.model)
    if request.num_draws > most_draws:
        raise ApiError(f"'num_draws' may be {most_draws} at most.", param="num_draws")
    ids = await endpoint.readers.run(lambda: _read(endpoint, request), is_gone)
    seed = secrets.randbits(31) if request.seed is None else request.seed
    try:
        asked = endpoint.engine.ask(lambda model: _draw(model, ids, request.num_draws, seed), seconds)
        draws = await unless_gone(asked, is_gone)
    except QueueFullError as error:
        raise of_queue(error) from error
    except TimeoutError as error:
        raise ApiError(f"{error}; ask for fewer draws.", 504, "server_error", code="timeout") from error
    return await endpoint.readers.run(lambda: _describe(endpoint, request, draws), is_gone)


def _read(endpoint: Endpoint, request: PoolRequest) -> list[int]:
    """Tokens of the text, after all checks."""
    try:  # With any counts it would raise the same.
        for temperature in request.temperatures:
            distribution_of_pool(torch.tensor([request.num_draws]), temperature)
    except ValueError as error:
        raise ApiError(str(error), param="temperatures") from error
    prompt = endpoint.tokens_of(request.prompt)
    size = endpoint.model.config.chunk_size
    if len(request.written) % size:
        raise ApiError(f"'written' holds whole chunks of {size} tokens.", param="written")
    ids = [*prompt, *(endpoint.tokens_of(request.written, "written") if request.written else [])]
    if endpoint.room_after(ids) < size:
        raise ApiError("there is no room after the text.", param="prompt", code="context_length_exceeded")
    return ids


def _describe(endpoint: Endpoint, request: PoolRequest, draws: list[tuple[int, ...]]) -> dict[str, Any]:
    counted = Counter(draws).most_common()
    counts = torch.tensor([count for _, count in counted])
    distributions = [
        distribution_of_pool(counts, temperature).tolist() for temperature in request.temperatures
    ]
    candidates = [
        {
            "token_ids": list(tokens),
            "tokens": spell_tokens(endpoint.readers.tokenizer, tokens),
            "count": count,
            "chances": [distribution[place] for distribution in distributions],
        }
        for place, (tokens, count) in enumerate(counted[: request.most])
    ]
    return {
        "object": "calm.pool",
        "model": request.model,
        "num_draws": request.num_draws,
        "num_different": len(counted),
        "temperatures": request.temperatures,
        "candidates": candidates,
    }


@torch.no_grad()
def _draw(
    model: CalmForCausalLM, ids: list[int], num_draws: int, seed: int
) -> Generator[None, None, list[tuple[int, ...]]]:
    """Draws of the chunk after a text, at temperature 1: first the text is read, then some at a time."""
    states_1CD = Prompt.of(model, ids).read(model)
    randomness = DrawsInParts(num_draws, generators_of_rows(seed, [ids], model.device))
    draws: list[tuple[int, ...]] = []
    while len(draws) < num_draws:
        yield
        number = min(_DRAWS_AT_ONCE, num_draws - len(draws))
        draws_N1K = model.draw_chunks(states_1CD[:, -1], number, randomness.begin(len(draws)))
        draws += [tuple(chunk) for chunk in draws_N1K[:, 0].tolist()]
    return draws
