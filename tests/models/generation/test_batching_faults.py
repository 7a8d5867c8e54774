"""A row that cannot be written leaves; the others write what they would have written without it."""

import itertools

import pytest
import torch
from tiny import tiny_model

from calm.models.generation import lean
from calm.models.generation.batching import BatchLimits, ChunkBatch
from calm.models.generation.rows import Failed, OpenRows
from calm.models.generation.sampler_registry import sampler_from
from calm.models.generation.slots import SlotCache

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


def join_in_turn(model, copies=1):
    """Two rows for two places, the first of which ends at once, and others whose prompts are read ahead."""
    batch, plain = ChunkBatch(model, BatchLimits(max_rows=2)), SETTINGS[0]
    rows = [batch.join([5] * 24, plain, 4, 9), batch.join([6] * 40, plain, 40, 1)]
    rows += [batch.join([7] * 4, plain, 8, 2, copy) for copy in range(copies)]
    return batch, [*rows, batch.join([8] * 4, plain, 8, 3)]


class Once(FailsFor):
    """Fails a single time."""

    def __init__(self, real, is_bad=lambda *_: True):
        super().__init__(real, lambda *own: not self.has_failed and is_bad(*own), MemoryError())
        self.has_failed = False

    def __call__(self, *arguments, **more):
        try:
            return super().__call__(*arguments, **more)
        except MemoryError:
            self.has_failed = True
            raise

    def as_method_of(self, owner, name, monkeypatch):
        monkeypatch.setattr(owner, name, lambda *own: self(*own))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(OpenRows, "with_row"), (SlotCache, "put"), (SlotCache, "_make_room"), (OpenRows, "select")],
)
def test_a_row_that_cannot_take_over_a_place_leaves_alone(owner, name, model, monkeypatch):
    """And its copies, which wait behind it, begin at the next place."""
    expected, _ = write(*join_in_turn(model, copies=2), 16)
    batch, rows = join_in_turn(model, copies=2)
    before, _ = write(batch, rows, 1)
    is_newcomer = (lambda own, _: rows[2] in own.rows) if name == "select" else lambda *_: True
    broken = Once(getattr(owner, name), is_newcomer)
    broken.as_method_of(owner, name, monkeypatch)
    texts, failed = write(batch, rows, 15, dict(zip(rows, before, strict=True)))
    assert [one.row for one in failed] == [rows[2]] and type(failed[0].error) is MemoryError
    assert texts.pop(2) == [] and texts == [*expected[:2], *expected[3:]] and len(batch) == 0


def test_no_place_is_free_of_those_that_cannot_take_it_over(model, monkeypatch):
    """All rows have ended, and one of two newcomers fails."""
    batch, plain = ChunkBatch(model, BatchLimits(max_rows=2)), SETTINGS[0]
    rows = [batch.join([5 + number] * 4, plain, 4, number) for number in range(4)]
    Once(SlotCache.put).as_method_of(SlotCache, "put", monkeypatch)
    texts, failed = write(batch, rows, 4)
    assert [one.row for one in failed] == [rows[2]]
    assert [len(text) for text in texts] == [4, 4, 0, 4]


def test_rows_that_have_ended_may_stay_in_memory(model, monkeypatch):
    expected, _ = write(other := ChunkBatch(model), join_all(other), 6)
    batch = ChunkBatch(model)
    rows = join_all(batch)
    before, _ = write(batch, rows, 2)
    batch.drop(rows[1])
    Once(OpenRows.select).as_method_of(OpenRows, "select", monkeypatch)
    texts, failed = write(batch, rows, 4, dict(zip(rows, before, strict=True)))
    assert not failed and len(texts.pop(1)) == 8
    assert texts == [*expected[:1], *expected[2:]]


@pytest.mark.parametrize("name", ["concat", "select"])
def test_halves_that_cannot_be_copied_or_put_together(name, model, monkeypatch):
    """The second waits to join the first again; of rows that are not even copied only those are lost."""
    expected, _ = write(other := ChunkBatch(model), join_all(other), 8)
    batch = ChunkBatch(model)
    rows = join_all(batch)
    before, _ = write(batch, rows, 1)
    step = batch._steps._step
    monkeypatch.setattr(step, "forward", FailsFor(step.forward, lambda own, *_: len(own) > 2, MemoryError()))
    if name == "select":
        Once(OpenRows.select, lambda _, places: len(places) == 2).as_method_of(
            OpenRows, "select", monkeypatch
        )
    else:
        broken = Once(OpenRows.concat, lambda parts: len(parts) > 1)
        monkeypatch.setattr(OpenRows, "concat", broken)
    texts, failed = write(batch, rows, 7, dict(zip(rows, before, strict=True)))
    lost = 2 if name == "select" else 0
    assert [one.row for one in failed] == rows[:lost]
    assert texts[lost:] == expected[lost:] and len(batch) == 0


def test_a_text_that_has_ended_is_not_read(model, monkeypatch):
    """It would be in vain, and it might fail."""
    expected, _ = write(*join_in_turn(model), 16)
    real = model.embed_chunks

    def embed_chunks(chunks_BCK, *others):
        assert not (chunks_BCK == torch.tensor(expected[0])).all(-1).any()
        return real(chunks_BCK, *others)

    monkeypatch.setattr(model, "embed_chunks", embed_chunks)
    assert write(*join_in_turn(model), 16) == (expected, [])


def test_a_text_that_has_ended_needs_no_room(model, monkeypatch):
    """Its sixteen chunks fill what there is."""

    def join():
        batch, plain = ChunkBatch(model, BatchLimits(max_rows=2)), SETTINGS[0]
        texts = [([5] * 60, 8), ([6] * 4, 12), ([7] * 4, 8)]
        return batch, [batch.join(text, plain, budget, seed) for seed, (text, budget) in enumerate(texts)]

    expected, _ = write(*join(), 6)
    real = SlotCache._make_room
    is_too_much = FailsFor(real, lambda _, needed: needed > 16, MemoryError())
    monkeypatch.setattr(SlotCache, "_make_room", lambda *own: is_too_much(*own))
    assert write(*join(), 6) == (expected, [])


def test_what_an_ended_text_leaves_behind_is_not_read_by_the_next(model):
    """In half precision, values may overflow."""
    expected, _ = write(*join_in_turn(model), 16)
    batch, rows = join_in_turn(model)

    def overflow(_, __, out):
        if out.dim() == 2:  # Not a prompt.
            out[[row.has_ended for row in batch._open.rows]] = float("inf")

    hook = model.backbone.layers[0].self_attn.v_proj.register_forward_hook(overflow)
    before, _ = write(batch, rows, 1)
    assert any(states.isinf().any() for states in batch._open.cache.window())
    hook.remove()
    assert write(batch, rows, 15, dict(zip(rows, before, strict=True))) == (expected, [])


def test_nothing_is_kept_once_the_last_row_that_is_written_is_dropped(model):
    batch, rows = join_in_turn(model)
    batch.step()
    assert rows[0].has_ended and rows[0] in batch._open.rows
    for row in rows[1:]:
        batch.drop(row)
    assert batch._open is None and batch._ready == [] and len(batch) == 0 and batch.step() == []


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
