"""Candidates for the next chunk: draws, their counts, and their probabilities at several temperatures."""

import secrets
from typing import Any

import torch

from calm.core.temperature import distribution_of_pool
from calm.models.generation.alternatives import Alternatives, draw_alternatives, ends_of, up_to_end
from calm.models.thoughts import Thoughts
from calm.serving.endpoint import Endpoint
from calm.serving.engine import QueueFullError
from calm.serving.errors import ApiError
from calm.serving.protocol import PoolRequest
from calm.serving.readers import IsGone, unless_gone
from calm.serving.request_texts import of_queue
from calm.serving.settings import ServerSettings
from calm.text.decoding import spell_tokens


async def describe_pool(
    endpoint: Endpoint, request: PoolRequest, settings: ServerSettings, is_gone: IsGone
) -> dict[str, Any]:
    """The most frequent draws of the chunk after a prompt and the tokens generated after it.

    Args:
        endpoint: The endpoint, for its model and tokenizer.
        request: The request.
        settings: What the server allows, and the draws of a request that sets no number.
        is_gone: Whether the client has left.

    Raises:
        ApiError: If the request cannot be served, or takes too long.
    """
    endpoint.check_name(request.model)
    num_draws = request.num_draws or min(settings.draws, settings.max_draws)
    if num_draws > settings.max_draws:
        raise ApiError(f"'num_draws' must be at most {settings.max_draws}.", param="num_draws")
    _check_temperatures(request.temperatures, num_draws)
    thoughts = endpoint.thoughts_for(request.num_thoughts)
    prompt, written = await endpoint.readers.run(lambda: _read(endpoint, request, thoughts), is_gone)
    seed = secrets.randbits(31) if request.seed is None else request.seed
    try:
        asked = endpoint.engine.ask(
            lambda model: draw_alternatives(
                model,
                prompt,
                num_draws=num_draws,
                temperatures=request.temperatures,
                most=request.most,
                chunk=request.chunk,
                seed=seed,
                thoughts=thoughts,
                written=written,
            ),
            settings.seconds,
        )
        pool = await unless_gone(asked, is_gone)
    except QueueFullError as error:
        raise of_queue(error) from error
    except TimeoutError as error:
        raise ApiError(f"{error}; ask for fewer draws.", 504, "server_error", code="timeout") from error
    return await endpoint.readers.run(lambda: _describe(endpoint, request, num_draws, pool), is_gone)


def _check_temperatures(temperatures: list[float], num_draws: int) -> None:
    """Raise ApiError for a temperature that so many draws are too few for, or that is out of range."""
    try:  # With any counts it would raise the same.
        for temperature in temperatures:
            distribution_of_pool(torch.tensor([num_draws]), temperature)
    except ValueError as error:
        raise ApiError(str(error), param="temperatures") from error


def _read(endpoint: Endpoint, request: PoolRequest, thoughts: Thoughts | None) -> tuple[list[int], list[int]]:
    """Check a request, and return the token ids of its prompt and those generated after it."""
    if request.messages is not None and request.prompt is None:
        prompt, place = endpoint.tokens_of_chat(request.messages), "messages"
    elif request.prompt is not None and request.messages is None:
        prompt, place = endpoint.tokens_of(request.prompt), "prompt"
    else:
        raise ApiError(
            "a pool needs either 'prompt' or 'messages'; give exactly one of them.", param="prompt"
        )
    size = endpoint.config.chunk_size
    if len(request.written) % size:
        raise ApiError(f"'written' must consist of whole chunks of {size} tokens.", param="written")
    _check_chunk(endpoint, request.chunk)
    written = endpoint.tokens_of(request.written, "written") if request.written else []
    room = endpoint.room_after([*prompt, *written], thoughts)
    if room is not None and room < size:
        raise ApiError(
            "the text leaves no room for another chunk in the context; shorten it.",
            param=place,
            code="context_length_exceeded",
        )
    return prompt, written


def _check_chunk(endpoint: Endpoint, chunk: list[int]) -> None:
    """Raise ApiError unless a chunk is complete or ends a text."""
    if not chunk:
        return
    config = endpoint.config
    eos_ids = ends_of(config)
    is_whole = len(chunk) == config.chunk_size or chunk[-1] in eos_ids
    if not is_whole or len(chunk) > config.chunk_size or up_to_end(chunk, eos_ids) != tuple(chunk):
        raise ApiError(
            f"'chunk' must have {config.chunk_size} tokens, or fewer if it ends with an EOS token; no tokens "
            "may follow the end.",
            param="chunk",
        )
    endpoint.tokens_of(chunk, "chunk")


def _describe(endpoint: Endpoint, request: PoolRequest, num_draws: int, pool: Alternatives) -> dict[str, Any]:
    candidates = [
        {
            "token_ids": list(one.tokens),
            "tokens": spell_tokens(endpoint.readers.tokenizer, one.tokens),
            "count": one.count,
            "chances": one.chances,
            **({} if one.probabilities is None else {"probabilities": one.probabilities}),
        }
        for one in pool.candidates
    ]
    return {
        "object": "calm.pool",
        "model": request.model,
        "num_draws": num_draws,
        "num_different": pool.num_different,
        "temperatures": request.temperatures,
        "candidates": candidates,
    }
