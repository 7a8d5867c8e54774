"""What could come next: draws of the next chunk, how often each, and what temperature makes of them."""

import secrets
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calm.core.chunks import as_id_tensor
from calm.core.random import DrawsInParts, generators_of_rows
from calm.core.temperature import distribution_of_pool
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmConfig
from calm.models.heads import Likelihood
from calm.models.heads.contract import MIN_TEMPERATURE
from calm.models.writing.prompts import Prompt
from calm.serving.endpoint import Endpoint
from calm.serving.engine import QueueFullError
from calm.serving.errors import ApiError
from calm.serving.protocol import PoolRequest
from calm.serving.readers import IsGone, unless_gone
from calm.serving.request_texts import of_queue
from calm.text.decoding import spell_tokens

_Chunk = tuple[int, ...]
_DRAWS_AT_ONCE = 64  # Between two steps of the texts that are being written.


@dataclass(frozen=True)
class _Candidate:
    """A chunk that could come, up to the token that ends a text; the rest is padding, whatever was drawn.

    Args:
        tokens: Its tokens.
        count: How often it was drawn.
        chances: What the pool rule makes of all draws, at each temperature.
        probabilities: What the head itself gives it at each, None at those that it does not take; None
            for a head that cannot tell.
    """

    tokens: _Chunk
    count: int
    chances: list[float]
    probabilities: Sequence[float | None] | None = None


class _Pool(NamedTuple):
    """Candidates that are told, and how many there are."""

    told: list[_Candidate]
    num_different: int


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
        asked = endpoint.engine.ask(lambda model: _draw(model, ids, request, seed), seconds)
        pool = await unless_gone(asked, is_gone)
    except QueueFullError as error:
        raise of_queue(error) from error
    except TimeoutError as error:
        raise ApiError(f"{error}; ask for fewer draws.", 504, "server_error", code="timeout") from error
    return await endpoint.readers.run(lambda: _describe(endpoint, request, pool), is_gone)


def _read(endpoint: Endpoint, request: PoolRequest) -> list[int]:
    """Tokens of the text, after all checks."""
    try:  # With any counts it would raise the same.
        for temperature in request.temperatures:
            distribution_of_pool(torch.tensor([request.num_draws]), temperature)
    except ValueError as error:
        raise ApiError(str(error), param="temperatures") from error
    if request.messages is not None and request.prompt is None:
        prompt, place = endpoint.tokens_of_chat(request.messages), "messages"
    elif request.prompt is not None and request.messages is None:
        prompt, place = endpoint.tokens_of(request.prompt), "prompt"
    else:
        raise ApiError("a pool follows either a 'prompt' or 'messages'; give one of them.", param="prompt")
    size = endpoint.model.config.chunk_size
    if len(request.written) % size:
        raise ApiError(f"'written' holds whole chunks of {size} tokens.", param="written")
    _check_chunk(endpoint, request.chunk)
    ids = [*prompt, *(endpoint.tokens_of(request.written, "written") if request.written else [])]
    if endpoint.room_after(ids) < size:
        raise ApiError("there is no room after the text.", param=place, code="context_length_exceeded")
    return ids


def _check_chunk(endpoint: Endpoint, chunk: list[int]) -> None:
    """Raise ApiError unless a chunk is a whole one, or ends a text."""
    if not chunk:
        return
    config = endpoint.model.config
    eos_ids = _eos_ids(config)
    is_whole = len(chunk) == config.chunk_size or chunk[-1] in eos_ids
    if not is_whole or len(chunk) > config.chunk_size or _up_to_end(chunk, eos_ids) != tuple(chunk):
        raise ApiError(
            f"'chunk' holds {config.chunk_size} tokens, or fewer if the last one ends a text; none stand "
            "behind the end.",
            param="chunk",
        )
    endpoint.tokens_of(chunk, "chunk")


def _describe(endpoint: Endpoint, request: PoolRequest, pool: _Pool) -> dict[str, Any]:
    candidates = [
        {
            "token_ids": list(one.tokens),
            "tokens": spell_tokens(endpoint.readers.tokenizer, one.tokens),
            "count": one.count,
            "chances": one.chances,
            **({} if one.probabilities is None else {"probabilities": one.probabilities}),
        }
        for one in pool.told
    ]
    return {
        "object": "calm.pool",
        "model": request.model,
        "num_draws": request.num_draws,
        "num_different": pool.num_different,
        "temperatures": request.temperatures,
        "candidates": candidates,
    }


@torch.no_grad()
def _draw(
    model: CalmForCausalLM, ids: list[int], request: PoolRequest, seed: int
) -> Generator[None, None, _Pool]:
    """Draws of the chunk after a text, at temperature 1: first the text is read, then some at a time."""
    state_1D = Prompt.of(model, ids).read(model)[:, -1]
    randomness = DrawsInParts(request.num_draws, generators_of_rows(seed, [ids], model.device))
    draws: list[_Chunk] = []
    while len(draws) < request.num_draws:
        yield
        number = min(_DRAWS_AT_ONCE, request.num_draws - len(draws))
        draws_N1K = model.draw_chunks(state_1D, number, randomness.begin(len(draws)))
        draws += [tuple(chunk) for chunk in draws_N1K[:, 0].tolist()]
    candidates = _candidates(draws, request.temperatures, _eos_ids(model.config))
    told = candidates[: request.most]
    if request.chunk and not any(one.tokens == tuple(request.chunk) for one in told):
        never = _Candidate(tuple(request.chunk), 0, [0.0] * len(request.temperatures))
        told.append(next((one for one in candidates if one.tokens == never.tokens), never))
    if isinstance(model.head, Likelihood):
        told = yield from _with_probabilities(model, state_1D, told, request.temperatures)
    return _Pool(told, len(candidates))


def _with_probabilities(
    model: CalmForCausalLM, state_1D: Tensor, candidates: list[_Candidate], temperatures: Sequence[float]
) -> Generator[None, None, list[_Candidate]]:
    """Candidates with what the head gives them, some at a time."""
    found: list[_Candidate] = []
    while len(found) < len(candidates):
        part, shares_T = candidates[len(found) : len(found) + _DRAWS_AT_ONCE], []
        for temperature in temperatures:
            yield
            shares_T.append(_probabilities(model, state_1D, part, temperature))
        for place, one in enumerate(part):
            found.append(replace(one, probabilities=[shares[place] for shares in shares_T]))
    return found


def _candidates(
    draws: Sequence[_Chunk], temperatures: Sequence[float], eos_ids: Sequence[int]
) -> list[_Candidate]:
    """All that was drawn, the most frequent first."""
    counted = Counter(draws)
    counts = torch.tensor(list(counted.values()))
    distributions = [distribution_of_pool(counts, temperature).tolist() for temperature in temperatures]
    counts_by_end: Counter[_Chunk] = Counter()
    chances_by_end: dict[_Chunk, list[float]] = {}
    for place, (chunk, count) in enumerate(counted.items()):
        tokens = _up_to_end(chunk, eos_ids)
        before = chances_by_end.get(tokens, [0.0] * len(temperatures))
        counts_by_end[tokens] += count
        chances_by_end[tokens] = [
            chance + one[place] for chance, one in zip(before, distributions, strict=True)
        ]
    return [
        _Candidate(tokens, count, chances_by_end[tokens]) for tokens, count in counts_by_end.most_common()
    ]


def _probabilities(
    model: CalmForCausalLM, state_1D: Tensor, candidates: Sequence[_Candidate], temperature: float
) -> Sequence[float | None]:
    """What a head with a likelihood gives each candidate at a temperature."""
    head, size = model.head, model.config.chunk_size
    if not head.config.lowest_temperature <= temperature <= 1:
        return [None] * len(candidates)
    padded = [[*one.tokens, *(size - len(one.tokens)) * [0]] for one in candidates]
    chunks_CK = torch.tensor(padded, device=model.device)
    if temperature < MIN_TEMPERATURE:  # The head writes its likeliest tokens.
        written_11K = head.draw_chunks(head.prepare(state_1D), 1, temperature=temperature)
        of_token_CK = (chunks_CK == written_11K[0]).double()
    else:
        assert isinstance(head, Likelihood)
        states_CD = state_1D.expand(len(candidates), -1)
        of_token_CK = head.token_probabilities(states_CD, chunks_CK, temperature).of_token_PK.double()
    lengths = [len(one.tokens) for one in candidates]
    return [float(row[:length].prod()) for row, length in zip(of_token_CK, lengths, strict=True)]


def _up_to_end(tokens: Sequence[int], eos_ids: Sequence[int]) -> _Chunk:
    end = next((place for place, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tuple(tokens[: end + 1])


def _eos_ids(config: CalmConfig) -> list[int]:
    ids: list[int] = as_id_tensor(config.eos_token_id, torch.device("cpu")).tolist()
    return ids
