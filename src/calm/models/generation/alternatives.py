"""Alternatives for the next chunk: draws, their counts, and their probabilities at several temperatures.

Shapes: D hidden size, N draws, K tokens of a chunk, C candidates, T temperatures.
"""

from collections import Counter
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.cache_utils import DynamicCache

from calm.core.chunks import as_id_tensor
from calm.core.random import DrawsInParts, generators_of_rows
from calm.core.temperature import distribution_of_pool
from calm.models.generation.model import ChunkModel
from calm.models.generation.prompts import Prompt, read_chunks
from calm.models.heads import Likelihood
from calm.models.heads.contract import MIN_TEMPERATURE
from calm.models.thoughts import THOUGHT, Thoughts, num_at_once

Chunk = tuple[int, ...]
_DRAWS_AT_ONCE = 64


@dataclass(frozen=True)
class Candidate:
    """A possible next chunk, up to the token that ends a text; what was drawn after that does not count.

    Args:
        tokens: Its tokens.
        count: How often it was drawn.
        chances: Its probability under the pool rule over all draws, at each temperature.
        probabilities: Its probability under the head at each temperature, None at those that the head does
            not support; None for a head without a likelihood.
    """

    tokens: Chunk
    count: int
    chances: list[float]
    probabilities: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Alternatives:
    """Alternatives for the next chunk.

    Args:
        candidates: Candidates, the most frequent first.
        num_different: How many different ones there are, including those not in `candidates`.
    """

    candidates: list[Candidate]
    num_different: int


@torch.no_grad()
def draw_alternatives(
    model: ChunkModel,
    ids: Sequence[int],
    *,
    num_draws: int,
    temperatures: Sequence[float],
    max_candidates: int,
    seed: int,
    chunk: Sequence[int] = (),
    thoughts: Thoughts | None = None,
    written: Sequence[int] = (),
) -> Generator[None, None, Alternatives]:
    """Draw the chunk after a text many times, at temperature 1.

    A generator: it reads the text, then makes a few draws at a time, with little work between two yields, so
    that a server can do other work in between.

    Args:
        model: The model.
        ids: Tokens of the text, or of a prompt.
        num_draws: How many draws.
        temperatures: Temperatures at which the pool rule weights them.
        max_candidates: How many candidates to return at most, the most frequent first.
        seed: Seed of the draws.
        chunk: A chunk to return in any case, up to the token that ends a text.
        thoughts: Thoughts after the prompt.
        written: Tokens that were generated after that, in whole chunks.
    """
    size = model.config.chunk_size
    state_1D = yield from _state_after(
        model, Prompt.of(model, ids).followed_by(thoughts, size).with_chunks(written, size)
    )
    randomness = DrawsInParts(num_draws, generators_of_rows(seed, [[*ids, *written]], model.device))
    draws: list[Chunk] = []
    while len(draws) < num_draws:
        yield
        number = min(_DRAWS_AT_ONCE, num_draws - len(draws))
        draws_N1K = model.draw_chunks(state_1D, number, randomness.begin(len(draws)))
        draws += [tuple(chunk) for chunk in draws_N1K[:, 0].tolist()]
    drawn = _candidates(draws, temperatures, ends_of(model.config))
    candidates = drawn[:max_candidates]
    if chunk and not any(candidate.tokens == tuple(chunk) for candidate in candidates):
        undrawn = Candidate(tuple(chunk), 0, [0.0] * len(temperatures))
        candidates.append(
            next((candidate for candidate in drawn if candidate.tokens == undrawn.tokens), undrawn)
        )
    if isinstance(model.head, Likelihood):
        candidates = yield from _with_probabilities(model, state_1D, candidates, temperatures)
    return Alternatives(candidates, len(drawn))


def outcome_of(drawing: Generator[None, None, Alternatives]) -> Alternatives:
    """Run `draw_alternatives` to its result, without other work in between."""
    while True:
        try:
            next(drawing)
        except StopIteration as end:
            outcome: Alternatives = end.value
            return outcome


def _state_after(model: ChunkModel, prompt: Prompt) -> Generator[None, None, Tensor]:
    """The state at the end of a prompt, (1, D), reading a few of its thoughts at a time."""
    if not prompt.thinks:
        return prompt.read(model)[:, -1]
    size, cache = model.config.chunk_size, DynamicCache(config=model.config.backbone)
    is_thought_C = prompt.ids_BT[0, ::size] == THOUGHT
    read, state_1D = 0, None
    while True:
        end = read + num_at_once(is_thought_C[read:])
        states_1CD = read_chunks(
            model,
            prompt.ids_BT[:, read * size : end * size],
            prompt.mask_BC[:, :end],
            prompt.position_BC[:, read:end],
            cache,
            may_think=True,
            state_before=state_1D,
        )
        read, state_1D = end, states_1CD[:, -1]
        if read == len(is_thought_C):
            return state_1D
        yield


def _with_probabilities(
    model: ChunkModel, state_1D: Tensor, candidates: list[Candidate], temperatures: Sequence[float]
) -> Generator[None, None, list[Candidate]]:
    """Candidates with the head's probabilities, a few at a time."""
    results: list[Candidate] = []
    while len(results) < len(candidates):
        part, probs_TC = candidates[len(results) : len(results) + _DRAWS_AT_ONCE], []
        for temperature in temperatures:
            yield
            probs_TC.append(_probabilities(model, state_1D, part, temperature))
        for index, candidate in enumerate(part):
            results.append(replace(candidate, probabilities=[probs_C[index] for probs_C in probs_TC]))
    return results


def _candidates(
    draws: Sequence[Chunk], temperatures: Sequence[float], eos_ids: Sequence[int]
) -> list[Candidate]:
    """All candidates that were drawn, the most frequent first."""
    counted = Counter(draws)
    counts = torch.tensor(list(counted.values()))
    distributions = [distribution_of_pool(counts, temperature).tolist() for temperature in temperatures]
    counts_by_tokens: Counter[Chunk] = Counter()  # Chunks that differ only after their end are the same.
    chances: dict[Chunk, list[float]] = {}
    for index, (chunk, count) in enumerate(counted.items()):
        tokens = up_to_end(chunk, eos_ids)
        sums = chances.get(tokens, [0.0] * len(temperatures))
        counts_by_tokens[tokens] += count
        chances[tokens] = [
            chance + distribution[index] for chance, distribution in zip(sums, distributions, strict=True)
        ]
    return [Candidate(tokens, count, chances[tokens]) for tokens, count in counts_by_tokens.most_common()]


def _probabilities(
    model: ChunkModel, state_1D: Tensor, candidates: Sequence[Candidate], temperature: float
) -> Sequence[float | None]:
    """Probability of each candidate at a temperature, under a head with a likelihood."""
    head, size = model.head, model.config.chunk_size
    if not head.config.lowest_temperature <= temperature <= 1:
        return [None] * len(candidates)
    padded = [[*candidate.tokens, *(size - len(candidate.tokens)) * [0]] for candidate in candidates]
    chunks_CK = torch.tensor(padded, device=model.device)
    if temperature < MIN_TEMPERATURE:  # The head decodes greedily.
        greedy_11K = head.draw_chunks(head.prepare(state_1D), 1, temperature=temperature)
        prob_CK = (chunks_CK == greedy_11K[0]).double()
    else:
        assert isinstance(head, Likelihood)
        states_CD = state_1D.expand(len(candidates), -1)
        prob_CK = head.token_probabilities(states_CD, chunks_CK, temperature).of_token_PK.double()
    lengths = [len(candidate.tokens) for candidate in candidates]
    return [float(prob_K[:length].prod()) for prob_K, length in zip(prob_CK, lengths, strict=True)]


def up_to_end(tokens: Sequence[int], eos_ids: Collection[int]) -> Chunk:
    """Tokens up to and including the first that ends a text."""
    end = next((index for index, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tuple(tokens[: end + 1])


def ends_of(config: PreTrainedConfig | GenerationConfig) -> list[int]:
    """Tokens that end a text."""
    ids: list[int] = as_id_tensor(config.eos_token_id, torch.device("cpu")).tolist()
    return ids
