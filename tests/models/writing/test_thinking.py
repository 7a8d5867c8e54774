"""Rows that think before they are written, among others, in pieces and after beginnings that were kept."""

import random

import pytest
import torch
from tiny import EOS, tiny_model

from calm.models.thoughts import Thoughts
from calm.models.writing.batching import BatchLimits, ChunkBatch
from calm.models.writing.sampler_registry import sampler_from

SAMPLER = sampler_from(temperature=1.0)


def alone(model, prompt, number, budget, seed):
    text = model.generate(
        torch.tensor([prompt]), max_new_tokens=budget, seed=seed, temperature=1.0, num_thoughts=number
    )[0, len(prompt) :].tolist()
    return text[: text.index(EOS) + 1] if EOS in text else text


@pytest.mark.parametrize("chunks_at_once", [1, 3, 128])
@pytest.mark.parametrize("head_type", ["sequential", "categorical_flow"])
def test_a_row_among_others_is_the_row_alone(head_type, chunks_at_once):
    """Prompts share beginnings, some are equal but for their thoughts, and they join at random steps."""
    model = tiny_model(2, head_config={"head_type": head_type}).double()
    chance = random.Random(chunks_at_once)
    beginning = [chance.randrange(3, 40) for _ in range(40)]
    batch = ChunkBatch(model, BatchLimits(max_rows=4, chunks_at_once=chunks_at_once))
    waiting = [
        (
            beginning[: chance.choice([2, 16, 33, 40])] + [chance.randrange(3, 6)] * chance.randrange(2),
            chance.choice([0, 1, 2, 5]),
            chance.randrange(1, 12),
            chance.randrange(3),
        )
        for _ in range(30)
    ]
    requests, texts = {}, {}
    while waiting or len(batch):
        while waiting and (len(batch) == 0 or chance.random() < 0.5):
            prompt, number, budget, seed = waiting.pop()
            thoughts = Thoughts(number, 2, 1) if number else None
            row = batch.join(prompt, SAMPLER, budget, seed, thoughts=thoughts)
            requests[row], texts[row] = (prompt, number, budget, seed), []
        for written in batch.step():
            texts[written.row] += written.tokens
    assert len(texts) == 30 and len({number for _, number, *_ in requests.values()}) == 4
    for row, request in requests.items():
        assert texts[row] == alone(model, *request)


def test_pauses_are_tokens():
    """They are read like any others, so nothing of them is left out of a beginning that is kept."""
    model = tiny_model(2, head_config={"head_type": "sequential"}).double()
    model.config.thoughts = Thoughts(3, 2, 1, "pause").as_dict()
    prompt = [5, 6, 7, 8]
    text = alone(model, prompt, None, 8, 1)
    spelled = torch.tensor([[*prompt, *[2] * 8, 1, 1]])
    states = model(spelled).last_hidden_state[:, -1]
    batch = ChunkBatch(model)
    row = batch.join(prompt, SAMPLER, 8, 1, thoughts=Thoughts(3, 2, 1, "pause"))
    written = []
    while not row.has_ended:
        for one in batch.step():
            written += one.tokens
    assert written == text and states.isfinite().all()
