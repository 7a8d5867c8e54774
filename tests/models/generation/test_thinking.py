"""Rows that think before they write: among others, in pieces, and after cached prefixes."""

import random
from collections import Counter

import pytest
import torch
from recorders import BackboneCalls
from tiny import BOS, EOS, thinking_model, tiny_model

from calm.core.random import generators_of_rows
from calm.models.generation.alternatives import draw_alternatives, outcome_of, up_to_end
from calm.models.generation.batching import BatchLimits, ChunkBatch
from calm.models.generation.sampler_registry import sampler_from
from calm.models.thoughts import THOUGHT, Thoughts

SAMPLER = sampler_from(temperature=1.0)


def alone(model, prompt, num_thoughts, budget, seed):
    """What `generate` writes after one prompt."""
    text = model.generate(
        torch.tensor([prompt]), max_new_tokens=budget, seed=seed, temperature=1.0, num_thoughts=num_thoughts
    )[0, len(prompt) :].tolist()
    return text[: text.index(EOS) + 1] if EOS in text else text


@pytest.mark.parametrize("chunks_at_once", [1, 3, 128])
@pytest.mark.parametrize("head_type", ["sequential", "categorical_flow"])
def test_row_in_a_batch_writes_what_it_writes_alone(head_type, chunks_at_once):
    """They join at random steps; prompts share prefixes, and some differ only in their thoughts."""
    model = thinking_model(chunk_size=2, head_type=head_type)
    model.config.thoughts = None
    rng = random.Random(chunks_at_once)
    prefix = [rng.randrange(3, 40) for _ in range(40)]
    batch = ChunkBatch(model, BatchLimits(max_rows=4, chunks_at_once=chunks_at_once))
    waiting = [
        (
            prefix[: rng.choice([2, 16, 33, 40])] + [rng.randrange(3, 6)] * rng.randrange(2),
            rng.choice([0, 1, 2, 5]),
            rng.randrange(1, 12),
            rng.randrange(3),
        )
        for _ in range(30)
    ]
    requests, texts = {}, {}
    while waiting or len(batch):
        while waiting and (len(batch) == 0 or rng.random() < 0.5):
            prompt, num_thoughts, budget, seed = waiting.pop()
            thoughts = Thoughts(num_thoughts, 2, 1) if num_thoughts else None
            row = batch.join(prompt, SAMPLER, budget, seed, thoughts=thoughts)
            requests[row], texts[row] = (prompt, num_thoughts, budget, seed), []
        for written in batch.step():
            texts[written.row] += written.tokens
    assert len(texts) == 30 and len({num_thoughts for _, num_thoughts, *_ in requests.values()}) == 4
    for row, request in requests.items():
        assert texts[row] == alone(model, *request)


def test_pauses_are_read_like_other_tokens():
    """The text is drawn from the state after a prompt that spells them out, alone and in a batch."""
    model = tiny_model(2, head_config={"head_type": "sequential"}).double()
    model.config.thoughts = Thoughts(3, 2, 1, "pause").as_dict()
    prompt = [5, 6, 7, 8]
    text = alone(model, prompt, None, 8, 1)
    spelled = torch.tensor([[*prompt, *[2] * 8, 1, 1]])
    state = model(spelled).last_hidden_state[:, -1]
    drawn = model.draw_chunks(state, 1, generators_of_rows(1, [prompt], model.device))
    assert text[:2] == list(up_to_end(drawn[0, 0].tolist(), [EOS]))
    batch = ChunkBatch(model)
    row = batch.join(prompt, SAMPLER, 8, 1, thoughts=Thoughts(3, 2, 1, "pause"))
    written = []
    while not row.has_ended:
        for result in batch.step():
            written += result.tokens
    assert written == text


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_being_written_wait_for_at_most_a_few_thoughts(rows, monkeypatch):
    """Eight thoughts of each prompt, read side by side; and the texts are those of the rows alone."""
    model = thinking_model(chunk_size=2)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    batch, passes = ChunkBatch(model), BackboneCalls(model, monkeypatch)
    requests = {batch.join([5, 6, 7], SAMPLER, 40, 0): ([5, 6, 7], 0, 40, 0)}
    [writing] = requests
    texts = {writing: [token for written in batch.step() for token in written.tokens]}
    passes.take()
    for num_thoughts, prompt in zip([30, 21, 3, 16][:rows], [[9] * 8, [8] * 5, [3], [4] * 12], strict=False):
        row = batch.join(prompt, SAMPLER, 6, 1, thoughts=Thoughts(num_thoughts, BOS, EOS, scale=1.0))
        requests[row], texts[row] = (prompt, num_thoughts, 6, 1), []
    pieces, steps = [], 0
    while len(batch):
        for written in batch.step():
            texts[written.row] += written.tokens
        steps += 1
        if taken := passes.take():
            pieces.append(taken)
            assert len(taken) <= 10 and len(texts[writing]) == 2 * (steps + 1), "a row waited for many passes"
    assert 4 <= len(pieces) <= 6  # For thirty thoughts; the other rows' thoughts are mostly read beside them.
    for row, (prompt, num_thoughts, budget, seed) in requests.items():
        settings = {"max_new_tokens": budget, "seed": seed, "num_thoughts": num_thoughts, "temperature": 1.0}
        assert texts[row] == model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


def test_alternatives_are_drawn_a_few_thoughts_at_a_time(monkeypatch):
    model, ids, written = thinking_model(chunk_size=2), [5, 6, 7], [8, 9, 10, 11]
    thoughts = Thoughts(20, BOS, EOS, scale=1.0)
    settings = {"num_draws": 8, "temperatures": [1.0], "max_candidates": 8, "seed": 1}
    passes, counts = BackboneCalls(model, monkeypatch), []
    drawing = draw_alternatives(model, ids, thoughts=thoughts, written=written, **settings)
    with pytest.raises(StopIteration) as end:
        while True:
            next(drawing)
            counts.append(len(passes.take()))
    assert counts[:3] == [9, 8, 4] and sum(counts) == 21
    spelled = torch.tensor([[0, *ids, *thoughts.tokens(2), *written]])
    ids_1T, is_thought_1C = spelled.masked_fill(spelled == THOUGHT, 0), spelled[:, ::2] == THOUGHT
    mask = torch.ones_like(spelled)
    state = model(ids_1T, attention_mask=mask, is_thought=is_thought_1C).last_hidden_state[:, -1]
    generator = generators_of_rows(1, [[*ids, *written]], model.device)
    drawn = Counter(map(tuple, model.draw_chunks(state, 8, generator)[:, 0].tolist()))
    expected = Counter({up_to_end(chunk, [EOS]): count for chunk, count in drawn.items()})
    assert Counter({found.tokens: found.count for found in end.value.value.candidates}) == expected


def test_without_thoughts_written_tokens_count_as_part_of_the_prompt():
    model = tiny_model(2)
    settings = {"num_draws": 20, "temperatures": [0.5], "max_candidates": 20, "seed": 1}
    expected = outcome_of(draw_alternatives(model, [5, 6, 7, 8, 9], **settings))
    assert expected == outcome_of(draw_alternatives(model, [5, 6, 7], written=[8, 9], **settings))
