"""A row that cannot be written leaves; the others write what they would have written without it."""

import itertools

import pytest
from tiny import tiny_model

from calm.models.writing import lean
from calm.models.writing.batching import BatchLimits, ChunkBatch
from calm.models.writing.rows import Failed
from calm.models.writing.sampler_registry import sampler_from

SETTINGS = (
    sampler_from(),
    sampler_from(temperature=0.5, max_draws=8),
    sampler_from(temperature=0.7, sampler="pool", num_draws=6),
)
PROMPTS = ([5, 6, 7], [9] * 11, [12, 13], [14, 15, 16] * 20)


@pytest.fixture
def model():
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def write(batch, rows, steps, texts=None):
    """The tokens of each row, and what failed."""
    texts, failed = texts or {row: [] for row in rows}, []
    for _ in range(steps):
        for one in batch.step():
            if isinstance(one, Failed):
                failed.append(one)
            else:
                texts[one.row] += one.tokens
    return [texts[row] for row in rows], failed


def join_all(batch, without=None, settings=SETTINGS):
    return [
        batch.join(prompt, settings[place % len(settings)], 24, place)
        for place, prompt in enumerate(PROMPTS)
        if place != without
    ]


def poison(batch, *rows):
    """Read the prompts, and damage the states of some rows."""
    batch._read()
    for row in rows:
        batch._open.hidden_RD[batch._open.rows.index(row), 3] = float("nan")


class FailsFor:
    """A function of a model that fails where a row is among those that it is called for."""

    def __init__(self, real, is_bad, error):
        self.real, self.is_bad, self.error = real, is_bad, error

    def __call__(self, *arguments, **more):
        if self.is_bad(*arguments, **more):
            raise self.error
        return self.real(*arguments, **more)


@pytest.mark.parametrize("bad", range(4))
@pytest.mark.parametrize("same_settings", [False, True])
def test_a_state_that_is_not_finite_is_its_rows_alone(bad, same_settings, model):
    settings = SETTINGS[1:2] if same_settings else SETTINGS
    expected, _ = write(other := ChunkBatch(model), join_all(other, bad, settings), 6)
    batch = ChunkBatch(model)
    rows = join_all(batch, settings=settings)
    poison(batch, rows[bad])
    texts, failed = write(batch, rows, 6)
    assert [one.row for one in failed] == [rows[bad]] and "not finite" in str(failed[0].error)
    assert texts.pop(bad) == [] and texts == expected


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError(), RuntimeError("no memory")], ids=repr)
@pytest.mark.parametrize("place", ["sampling", "reading"])
def test_whatever_fails_the_others_lose_no_draw(place, error, model, monkeypatch):
    """In the middle of a step, after the rows before have drawn, or after all have."""
    expected, _ = write(other := ChunkBatch(model), join_all(other, 3), 6)
    batch = ChunkBatch(model)
    rows = join_all(batch)
    before, _ = write(batch, rows, 2)
    if place == "sampling":
        broken = FailsFor(model.sample_chunks, lambda _, __, own, ___: rows[3].generator in own, error)
        monkeypatch.setattr(model, "sample_chunks", broken)
    else:
        layers = itertools.cycle([False, True])  # The first has written into the cache.
        half_read = FailsFor(
            lean._attend,
            lambda _, __, ___, is_seen_RC, ____: next(layers) and int(is_seen_RC.sum(-1).max()) > 15,
            error,
        )
        monkeypatch.setattr(lean, "_attend", half_read)
    texts, failed = write(batch, rows, 4, dict(zip(rows, before, strict=True)))
    assert [(one.row, one.error) for one in failed] == [(rows[3], error)]
    assert texts[:3] == expected and len(texts[3]) == 8


def test_two_of_four_rows_fail(model, monkeypatch):
    batch = ChunkBatch(model)
    rows = join_all(batch)
    poison(batch, rows[0], rows[2])
    _, failed = write(batch, rows, 1)
    assert {one.row for one in failed} == {rows[0], rows[2]} and len(batch) == 2
    poison(batch, rows[1], rows[3])
    _, failed = write(batch, rows, 1)
    assert len(failed) == 2 and len(batch) == 0 and batch.step() == []
    assert write(batch, join_all(batch), 1)[1] == []  # As good as new.


@pytest.mark.parametrize("most", [1, 2, 3])
def test_what_is_too_much_at_once_is_done_in_parts(most, model, monkeypatch):
    expected, _ = write(other := ChunkBatch(model), join_all(other), 6)
    batch = ChunkBatch(model)
    rows = join_all(batch)
    for module, own in ((model.backbone, "inputs_embeds"), (batch._steps._step, None)):
        real = module.forward
        too_many = FailsFor(
            real, lambda *first, _own=own, **more: len(more[_own] if _own else first[0]) > most, MemoryError()
        )
        monkeypatch.setattr(module, "forward", too_many)
    texts, failed = write(batch, rows, 6)
    assert texts == expected and not failed


@pytest.mark.parametrize("draws_at_once", [1, 16, 17])
def test_rows_take_turns_where_their_draws_are_many(draws_at_once, model, monkeypatch):
    exact = SETTINGS[1:2]  # Up to 8 draws of a row.
    other = ChunkBatch(model)
    expected, _ = write(other, join_all(other, settings=exact), 6)
    batch, numbers, real = (
        ChunkBatch(model, BatchLimits(draws_at_once=draws_at_once)),
        [],
        model.sample_chunks,
    )
    rows = join_all(batch, settings=exact)
    monkeypatch.setattr(model, "sample_chunks", lambda *own: numbers.append(len(own[2])) or real(*own))
    texts, _ = write(batch, rows, 6)
    assert texts == expected and max(numbers) == max(1, draws_at_once // 8)
