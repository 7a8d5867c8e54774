"""Rows that join and leave a batch write what each would write alone."""

import random

import pytest
import torch
from tiny import EOS, tiny_model

from calm.models.generation.batching import BatchLimits, ChunkBatch
from calm.models.generation.sampler_registry import sampler_from

SAMPLERS = (
    sampler_from(temperature=1.0),
    sampler_from(temperature=0.7, max_draws=8),
    sampler_from(temperature=0.5, sampler="pool", num_draws=12, top_p=0.9),
    sampler_from(temperature=0.0, num_draws=6),
)


def alone(model, prompt, sampler, budget, seed):
    """What `generate` writes after one prompt."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=budget,
        seed=seed,
        temperature=sampler.temperature,
        sampler=sampler,
    )[0, len(prompt) :].tolist()
    return out[: out.index(EOS) + 1] if EOS in out else out


def random_requests(number, seed):
    """Arguments of `ChunkBatch.join`."""
    rng = random.Random(seed)
    return [
        (
            [rng.randrange(3, 40) for _ in range(rng.randrange(1, 30))],
            rng.choice(SAMPLERS),
            rng.randrange(1, 25),
            rng.randrange(1000),
        )
        for _ in range(number)
    ]


@pytest.mark.parametrize("max_rows", [1, 3, 64])
@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("head_type", "backbone_input"), [("energy", "tokens"), ("energy", "both"), ("sequential", "tokens")]
)
def test_rows_that_join_and_leave_write_what_they_write_alone(
    chunk_size, head_type, backbone_input, max_rows
):
    """They join at random steps, and differ in length, sampler, budget and seed."""
    model = tiny_model(chunk_size, backbone_input=backbone_input, head_config={"head_type": head_type})
    rng, batch = random.Random(chunk_size), ChunkBatch(model, BatchLimits(max_rows))
    waiting, texts, largest = random_requests(24, chunk_size), {}, 0
    requests, ends = {}, {}
    while waiting or len(batch):
        while waiting and (len(batch) == 0 or rng.random() < 0.5):
            request = waiting.pop()
            row = batch.join(*request)
            requests[row], texts[row] = request, []
        largest = max(largest, len(batch))
        results = batch.step()
        assert len(results) <= max_rows
        for written in results:
            assert 1 <= len(written.tokens) <= chunk_size and written.num_draws >= 1
            assert 0 < written.agreement <= 1
            texts[written.row] += written.tokens
            ends[written.row] = written.ended_by
    assert largest >= 4 and len(texts) == 24
    for row, request in requests.items():
        assert row.has_ended
        assert texts[row] == alone(model, *request)
        assert ends[row] == ("eos" if texts[row][-1] == EOS else "budget")


def test_equal_requests_write_the_same():
    model = tiny_model()
    batch = ChunkBatch(model)
    request = ([5, 6, 7], SAMPLERS[1], 16, 3)
    rows = [batch.join(*request) for _ in range(3)]
    texts = {row: [] for row in rows}
    while len(batch):
        for written in batch.step():
            texts[written.row] += written.tokens
    assert {tuple(text) for text in texts.values()} == {tuple(alone(model, *request))}


def test_dropping_a_row_does_not_change_the_others():
    model = tiny_model()
    batch, [first, second, third] = ChunkBatch(model), random_requests(3, 5)
    first, second = (first[0], first[1], 24, 1), (second[0], second[1], 24, 2)
    rows = [batch.join(*request) for request in (first, second, third)]
    texts = {row: [] for row in rows}
    for step in range(20):
        if step == 2:
            batch.drop(rows[0])
            batch.drop(rows[0])  # Dropping it again does nothing.
            assert len(batch) <= 2
        for written in batch.step():
            texts[written.row] += written.tokens
    assert len(batch) == 0 and batch.step() == []
    assert texts[rows[1]] == alone(model, *second)
    assert texts[rows[2]] == alone(model, *third)
    assert texts[rows[0]] == alone(model, *first)[: len(texts[rows[0]])] and len(texts[rows[0]]) <= 8


def test_the_cache_shrinks_with_its_longest_row():
    model = tiny_model(backbone_config={"max_position_embeddings": 256})
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    batch = ChunkBatch(model)
    batch.join([5] * 800, SAMPLERS[0], 8, 0)
    batch.join([5] * 4, SAMPLERS[0], 24, 0)
    batch.step()
    assert batch._open.cache.lengths == [201, 2]
    assert {(len(states), states.shape[2]) for states in batch._open.cache.window()} == {(2, 208)}
    batch.step()  # The long one ends.
    assert batch._open.cache.lengths == [3]
    assert {(len(states), states.shape[2]) for states in batch._open.cache.window()} == {(1, 16)}


@pytest.mark.parametrize(
    "method", ["rows.SlotCache.concat", "reading.read_chunks", "reading.SlotCache.select"]
)
def test_a_row_that_cannot_join_leaves_nothing_behind(method, monkeypatch):
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    batch, sampler = ChunkBatch(model), SAMPLERS[0]
    first = batch.join([5, 6, 7], sampler, 16, 1)
    written = {first: batch.step()[0].tokens}
    failing = batch.join([9, 10, 11, 12, 13], sampler, 8, 2)
    with monkeypatch.context() as patched:
        patched.setattr(
            f"calm.models.generation.{method}", lambda *_, **__: (_ for _ in ()).throw(MemoryError())
        )
        failed, result = batch.step()
    assert (failed.row, type(failed.error)) == (failing, MemoryError)
    written[first] += result.tokens
    second = batch.join([14, 15], sampler, 8, 3)
    written[second] = []
    for _ in range(2):
        for result in batch.step():
            written[result.row] += result.tokens
    assert written[first] == alone(model, [5, 6, 7], sampler, 16, 1)[: len(written[first])]
    assert len(written[first]) == 16
    assert written[second] == alone(model, [14, 15], sampler, 8, 3)
