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
from calm.serving.readers import IsGone, wait_for_result
from calm.serving.request_texts import queue_error
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
    num_draws = request.num_draws or settings.draws
    if num_draws > settings.max_draws:
        raise ApiError(f"'num_draws' must be at most {settings.max_draws}.", param="num_draws")
    _check_temperatures(request.temperatures, num_draws)
    thoughts = endpoint.thoughts_for(request.num_thoughts)
    prompt, written = await endpoint.readers.run(lambda: _read_tokens(endpoint, request, thoughts), is_gone)
    seed = secrets.randbits(31) if request.seed is None else request.seed
    try:
        future = endpoint.engine.submit_task(
            lambda model: draw_alternatives(
                model,
                prompt,
                num_draws=num_draws,
                temperatures=request.temperatures,
                max_candidates=request.most,
                chunk=request.chunk,
                seed=seed,
                thoughts=thoughts,
                written=written,
            ),
            settings.seconds,
        )
        pool = await wait_for_result(future, is_gone)
    except QueueFullError as error:
        raise queue_error(error) from error
    except TimeoutError as error:
        raise ApiError(f"{error}; ask for fewer draws.", 504, "server_error", code="timeout") from error
    return await endpoint.readers.run(lambda: _describe(endpoint, request, num_draws, pool), is_gone)


def _check_temperatures(temperatures: list[float], num_draws: int) -> None:
    """Raise ApiError for a temperature that is out of range, or needs more draws."""
    try:  # Only the number of draws matters here, not what is drawn.
        for temperature in temperatures:
            distribution_of_pool(torch.tensor([num_draws]), temperature)
    except ValueError as error:
        raise ApiError(str(error), param="temperatures") from error


def _read_tokens(
    endpoint: Endpoint, request: PoolRequest, thoughts: Thoughts | None
) -> tuple[list[int], list[int]]:
    """Check a request, and return the token ids of its prompt and those generated after it."""
    if request.messages is not None and request.prompt is None:
        prompt, param = endpoint.tokenize_chat(request.messages), "messages"
    elif request.prompt is not None and request.messages is None:
        prompt, param = endpoint.tokenize(request.prompt), "prompt"
    else:
        raise ApiError(
            "a pool needs either 'prompt' or 'messages'; give exactly one of them.", param="prompt"
        )
    chunk_size = endpoint.config.chunk_size
    if len(request.written) % chunk_size:
        raise ApiError(f"'written' must consist of whole chunks of {chunk_size} tokens.", param="written")
    _check_chunk(endpoint, request.chunk)
    written = endpoint.tokenize(request.written, "written") if request.written else []
    room = endpoint.room_after([*prompt, *written], thoughts)
    if room is not None and room < chunk_size:
        raise ApiError(
            "the text leaves no room for another chunk in the context; shorten it.",
            param=param,
            code="context_length_exceeded",
        )
    return prompt, written


def _check_chunk(endpoint: Endpoint, chunk: list[int]) -> None:
    """Raise ApiError unless a chunk is complete or ends a text."""
    if not chunk:
        return
    config = endpoint.config
    eos_ids = ends_of(config)
    is_complete = len(chunk) == config.chunk_size or chunk[-1] in eos_ids
    if not is_complete or len(chunk) > config.chunk_size or up_to_end(chunk, eos_ids) != tuple(chunk):
        raise ApiError(
            f"'chunk' must have {config.chunk_size} tokens, or fewer if it ends with an EOS token; no tokens "
            "may follow the end.",
            param="chunk",
        )
    endpoint.tokenize(chunk, "chunk")


def _describe(endpoint: Endpoint, request: PoolRequest, num_draws: int, pool: Alternatives) -> dict[str, Any]:
    candidates = [
        {
            "token_ids": list(candidate.tokens),
            "tokens": spell_tokens(endpoint.readers.tokenizer, candidate.tokens),
            "count": candidate.count,
            "chances": candidate.chances,
            **({} if candidate.probabilities is None else {"probabilities": candidate.probabilities}),
        }
        for candidate in pool.candidates
    ]
    return {
        "object": "calm.pool",
        "model": request.model,
        "num_draws": num_draws,
        "num_different": pool.num_different,
        "temperatures": request.temperatures,
        "candidates": candidates,
    }
