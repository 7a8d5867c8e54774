"""Rows that think before they are written, among others, in pieces and after beginnings that were kept."""

import random
from collections import Counter

import pytest
import torch
from tiny import BOS, EOS, thinking_model, tiny_model

from calm.core.random import generators_of_rows
from calm.models.generation.alternatives import draw_alternatives, outcome_of, up_to_end
from calm.models.generation.batching import BatchLimits, ChunkBatch
from calm.models.generation.sampler_registry import sampler_from
from calm.models.thoughts import THOUGHT, Thoughts

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
    model = thinking_model(chunk_size=2, head_type=head_type)
    model.config.thoughts = None
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


class Passes:
    """Positions (rows, columns) of every pass of the backbone since this was last asked."""

    def __init__(self, model, monkeypatch):
        self._shapes, real = [], model.backbone.forward
        monkeypatch.setattr(model.backbone, "forward", lambda **own: self._note(own) or real(**own))

    def _note(self, own):
        self._shapes.append(tuple(own["inputs_embeds"].shape[:2]))

    def taken(self):
        shapes, self._shapes = self._shapes, []
        return shapes


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_that_write_wait_for_a_few_thoughts_at_most(rows, monkeypatch):
    """Eight of each prompt, which are read side by side; and the texts are those of the rows alone."""
    model = thinking_model(chunk_size=2)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    batch, passes = ChunkBatch(model), Passes(model, monkeypatch)
    asked = {batch.join([5, 6, 7], SAMPLER, 40, 0): ([5, 6, 7], 0, 40, 0)}
    [writing] = asked
    texts = {writing: [one for written in batch.step() for one in written.tokens]}
    passes.taken()
    for number, prompt in zip([30, 21, 3, 16][:rows], [[9] * 8, [8] * 5, [3], [4] * 12], strict=False):
        row = batch.join(prompt, SAMPLER, 6, 1, thoughts=Thoughts(number, BOS, EOS, scale=1.0))
        asked[row], texts[row] = (prompt, number, 6, 1), []
    pieces, steps = [], 0
    while len(batch):
        for written in batch.step():
            texts[written.row] += written.tokens
        steps += 1
        if taken := passes.taken():
            pieces.append(taken)
            assert len(taken) <= 10 and len(texts[writing]) == 2 * (steps + 1), "a row waited for many passes"
    assert 4 <= len(pieces) <= 6  # Of thirty thoughts; most of those of the other rows are among them.
    for row, (prompt, number, budget, seed) in asked.items():
        how = {"max_new_tokens": budget, "seed": seed, "num_thoughts": number, "temperature": 1.0}
        assert texts[row] == model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()


def test_a_pool_leaves_room_for_steps_between_its_thoughts(monkeypatch):
    model, ids, written = thinking_model(chunk_size=2), [5, 6, 7], [8, 9, 10, 11]
    thoughts = Thoughts(20, BOS, EOS, scale=1.0)
    how = {"num_draws": 8, "temperatures": [1.0], "max_candidates": 8, "seed": 1}
    passes, counts = Passes(model, monkeypatch), []
    drawing = draw_alternatives(model, ids, thoughts=thoughts, written=written, **how)
    with pytest.raises(StopIteration) as end:
        while True:
            next(drawing)
            counts.append(len(passes.taken()))
    assert counts[:3] == [9, 8, 4] and sum(counts) == 21
    spelled = torch.tensor([[0, *ids, *thoughts.tokens(2), *written]])
    ids_1T, is_thought_1C = spelled.masked_fill(spelled == THOUGHT, 0), spelled[:, ::2] == THOUGHT
    mask = torch.ones_like(spelled)
    state = model(ids_1T, attention_mask=mask, is_thought=is_thought_1C).last_hidden_state[:, -1]
    generator = generators_of_rows(1, [[*ids, *written]], model.device)
    drawn = Counter(map(tuple, model.draw_chunks(state, 8, generator)[:, 0].tolist()))
    assert Counter({one.tokens: one.count for one in end.value.value.candidates}) == Counter(
        {up_to_end(chunk, [EOS]): number for chunk, number in drawn.items()}
    )


def test_what_was_written_is_a_part_of_a_text_where_nothing_is_thought():
    model = tiny_model(2)
    how = {"num_draws": 20, "temperatures": [0.5], "max_candidates": 20, "seed": 1}
    whole = outcome_of(draw_alternatives(model, [5, 6, 7, 8, 9], **how))
    assert whole == outcome_of(draw_alternatives(model, [5, 6, 7], written=[8, 9], **how))
