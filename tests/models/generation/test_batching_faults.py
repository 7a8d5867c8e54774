"""A row that fails leaves the batch; the others write what they would have written without it."""

import itertools

import pytest
import torch
from tiny import tiny_model

from calm.models.generation import lean
from calm.models.generation.batching import BatchLimits, ChunkBatch
from calm.models.generation.rows import Failed, OpenRows
from calm.models.generation.sampler_registry import sampler_from
from calm.models.generation.slots import SlotCache

SAMPLERS = (
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
    """Run some steps; returns the tokens of each row, after those in `texts`, and the failures."""
    texts, failed = texts or {row: [] for row in rows}, []
    for _ in range(steps):
        for result in batch.step():
            if isinstance(result, Failed):
                failed.append(result)
            else:
                texts[result.row] += result.tokens
    return [texts[row] for row in rows], failed


def join_all(batch, without=None, samplers=SAMPLERS):
    return [
        batch.join(prompt, samplers[index % len(samplers)], 24, index)
        for index, prompt in enumerate(PROMPTS)
        if index != without
    ]


def poison(batch, *rows):
    """Read the prompts, and damage the states of some rows."""
    batch._read()
    for row in rows:
        batch._open.hidden_RD[batch._open.rows.index(row), 3] = float("nan")


class FailsFor:
    """Wraps a function so that it raises an error if its arguments are bad."""

    def __init__(self, real, is_bad, error):
        self.real, self.is_bad, self.error = real, is_bad, error

    def __call__(self, *args, **kwargs):
        if self.is_bad(*args, **kwargs):
            raise self.error
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("bad", range(4))
@pytest.mark.parametrize("same_sampler", [False, True])
def test_non_finite_state_fails_only_its_own_row(bad, same_sampler, model):
    samplers = SAMPLERS[1:2] if same_sampler else SAMPLERS
    expected, _ = write(reference := ChunkBatch(model), join_all(reference, bad, samplers), 6)
    batch = ChunkBatch(model)
    rows = join_all(batch, samplers=samplers)
    poison(batch, rows[bad])
    texts, failed = write(batch, rows, 6)
    assert [failure.row for failure in failed] == [rows[bad]] and "not finite" in str(failed[0].error)
    assert texts.pop(bad) == [] and texts == expected


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError(), RuntimeError("no memory")], ids=repr)
@pytest.mark.parametrize("stage", ["sampling", "reading"])
def test_failed_step_costs_the_other_rows_no_draw(stage, error, model, monkeypatch):
    """The step fails after the rows before have drawn, or after all have."""
    expected, _ = write(reference := ChunkBatch(model), join_all(reference, 3), 6)
    batch = ChunkBatch(model)
    rows = join_all(batch)
    before, _ = write(batch, rows, 2)
    if stage == "sampling":
        broken = FailsFor(
            model.sample_chunks, lambda _, __, generators, ___: rows[3].generator in generators, error
        )
        monkeypatch.setattr(model, "sample_chunks", broken)
    else:
        layers = itertools.cycle([False, True])  # The first layer has already written to the cache.
        half_read = FailsFor(
            lean._attend,
            lambda _, __, ___, is_seen_RC, ____: next(layers) and int(is_seen_RC.sum(-1).max()) > 15,
            error,
        )
        monkeypatch.setattr(lean, "_attend", half_read)
    texts, failed = write(batch, rows, 4, dict(zip(rows, before, strict=True)))
    assert [(failure.row, failure.error) for failure in failed] == [(rows[3], error)]
    assert texts[:3] == expected and len(texts[3]) == 8


def test_two_of_four_rows_fail(model, monkeypatch):
    batch = ChunkBatch(model)
    rows = join_all(batch)
    poison(batch, rows[0], rows[2])
    _, failed = write(batch, rows, 1)
    assert {failure.row for failure in failed} == {rows[0], rows[2]} and len(batch) == 2
    poison(batch, rows[1], rows[3])
    _, failed = write(batch, rows, 1)
    assert len(failed) == 2 and len(batch) == 0 and batch.step() == []
    assert write(batch, join_all(batch), 1)[1] == []  # The batch still works.


@pytest.mark.parametrize("max_rows", [1, 2, 3])
def test_rows_that_exceed_memory_together_are_written_in_parts(max_rows, model, monkeypatch):
    expected, _ = write(reference := ChunkBatch(model), join_all(reference), 6)
    batch = ChunkBatch(model)
    rows = join_all(batch)

    def is_too_much(*args, **kwargs):
        chunks = args[0] if args else kwargs["inputs_embeds"]
        return len(chunks) > max_rows

    for module in (model.backbone, batch._steps._step):
        monkeypatch.setattr(module, "forward", FailsFor(module.forward, is_too_much, MemoryError()))
    texts, failed = write(batch, rows, 6)
    assert texts == expected and not failed


def join_more_than_slots(model, copies=1):
    """Two rows for two slots, the first of which ends at once, and others whose prompts are read ahead."""
    batch, sampler = ChunkBatch(model, BatchLimits(max_rows=2)), SAMPLERS[0]
    rows = [batch.join([5] * 24, sampler, 4, 9), batch.join([6] * 40, sampler, 40, 1)]
    rows += [batch.join([7] * 4, sampler, 8, 2, copy) for copy in range(copies)]
    return batch, [*rows, batch.join([8] * 4, sampler, 8, 3)]


class FailsOnce(FailsFor):
    """Wraps a function so that it fails at its first bad call."""

    def __init__(self, real, is_bad=lambda *_: True):
        super().__init__(real, lambda *args: not self.has_failed and is_bad(*args), MemoryError())
        self.has_failed = False

    def __call__(self, *args, **kwargs):
        try:
            return super().__call__(*args, **kwargs)
        except MemoryError:
            self.has_failed = True
            raise

    def replace_method(self, owner, name, monkeypatch):
        monkeypatch.setattr(owner, name, lambda *args: self(*args))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(OpenRows, "with_row"), (SlotCache, "put"), (SlotCache, "_make_room"), (OpenRows, "select")],
)
def test_row_that_cannot_take_over_a_slot_fails_alone(owner, name, model, monkeypatch):
    """And its copies, which wait behind it, take over the next slot."""
    expected, _ = write(*join_more_than_slots(model, copies=2), 16)
    batch, rows = join_more_than_slots(model, copies=2)
    before, _ = write(batch, rows, 1)
    is_newcomer = (lambda open_rows, _: rows[2] in open_rows.rows) if name == "select" else lambda *_: True
    broken = FailsOnce(getattr(owner, name), is_newcomer)
    broken.replace_method(owner, name, monkeypatch)
    texts, failed = write(batch, rows, 15, dict(zip(rows, before, strict=True)))
    assert [failure.row for failure in failed] == [rows[2]] and type(failed[0].error) is MemoryError
    assert texts.pop(2) == [] and texts == [*expected[:2], *expected[3:]] and len(batch) == 0


def test_next_row_is_written_if_one_cannot_take_over_a_slot(model, monkeypatch):
    """All rows have ended, and one of two newcomers fails."""
    batch, sampler = ChunkBatch(model, BatchLimits(max_rows=2)), SAMPLERS[0]
    rows = [batch.join([5 + index] * 4, sampler, 4, index) for index in range(4)]
    FailsOnce(SlotCache.put).replace_method(SlotCache, "put", monkeypatch)
    texts, failed = write(batch, rows, 4)
    assert [failure.row for failure in failed] == [rows[2]]
    assert [len(text) for text in texts] == [4, 4, 0, 4]


def test_failure_to_remove_an_ended_row_changes_nothing(model, monkeypatch):
    expected, _ = write(reference := ChunkBatch(model), join_all(reference), 6)
    batch = ChunkBatch(model)
    rows = join_all(batch)
    before, _ = write(batch, rows, 2)
    batch.drop(rows[1])
    FailsOnce(OpenRows.select).replace_method(OpenRows, "select", monkeypatch)
    texts, failed = write(batch, rows, 4, dict(zip(rows, before, strict=True)))
    assert not failed and len(texts.pop(1)) == 8
    assert texts == [*expected[:1], *expected[2:]]


@pytest.mark.parametrize("name", ["concat", "select"])
def test_halves_that_cannot_be_copied_or_rejoined(name, model, monkeypatch):
    """A half that cannot be rejoined waits for a slot; only the rows of a half that cannot be copied fail."""
    expected, _ = write(reference := ChunkBatch(model), join_all(reference), 8)
    batch = ChunkBatch(model)
    rows = join_all(batch)
    before, _ = write(batch, rows, 1)
    step = batch._steps._step
    monkeypatch.setattr(
        step, "forward", FailsFor(step.forward, lambda chunks, *_: len(chunks) > 2, MemoryError())
    )
    if name == "select":
        FailsOnce(OpenRows.select, lambda _, indices: len(indices) == 2).replace_method(
            OpenRows, "select", monkeypatch
        )
    else:
        broken = FailsOnce(OpenRows.concat, lambda parts: len(parts) > 1)
        monkeypatch.setattr(OpenRows, "concat", broken)
    texts, failed = write(batch, rows, 7, dict(zip(rows, before, strict=True)))
    num_lost = 2 if name == "select" else 0
    assert [failure.row for failure in failed] == rows[:num_lost]
    assert texts[num_lost:] == expected[num_lost:] and len(batch) == 0


def test_last_chunk_of_a_text_is_not_read(model, monkeypatch):
    """Reading it would be wasted work, and might fail."""
    expected, _ = write(*join_more_than_slots(model), 16)
    real = model.embed_chunks

    def embed_chunks(chunks_BCK, *others):
        assert not (chunks_BCK == torch.tensor(expected[0])).all(-1).any()
        return real(chunks_BCK, *others)

    monkeypatch.setattr(model, "embed_chunks", embed_chunks)
    assert write(*join_more_than_slots(model), 16) == (expected, [])


def test_ended_text_needs_no_room_in_the_cache(model, monkeypatch):
    """Its sixteen chunks fill the cache."""

    def join():
        batch, sampler = ChunkBatch(model, BatchLimits(max_rows=2)), SAMPLERS[0]
        texts = [([5] * 60, 8), ([6] * 4, 12), ([7] * 4, 8)]
        return batch, [batch.join(text, sampler, budget, seed) for seed, (text, budget) in enumerate(texts)]

    expected, _ = write(*join(), 6)
    real = SlotCache._make_room
    is_too_much = FailsFor(real, lambda _, needed: needed > 16, MemoryError())
    monkeypatch.setattr(SlotCache, "_make_room", lambda *args: is_too_much(*args))
    assert write(*join(), 6) == (expected, [])


def test_row_does_not_read_what_an_ended_text_left_in_its_slot(model):
    """It might be infinite, as values may overflow in half precision."""
    expected, _ = write(*join_more_than_slots(model), 16)
    batch, rows = join_more_than_slots(model)

    def overflow(_, __, output):
        if output.dim() == 2:  # Not a prompt.
            output[[row.has_ended for row in batch._open.rows]] = float("inf")

    hook = model.backbone.layers[0].self_attn.v_proj.register_forward_hook(overflow)
    before, _ = write(batch, rows, 1)
    assert any(states.isinf().any() for states in batch._open.cache.window())
    hook.remove()
    assert write(batch, rows, 15, dict(zip(rows, before, strict=True))) == (expected, [])


def test_nothing_is_kept_once_all_rows_have_ended_or_are_dropped(model):
    batch, rows = join_more_than_slots(model)
    batch.step()
    assert rows[0].has_ended and rows[0] in batch._open.rows
    for row in rows[1:]:
        batch.drop(row)
    assert batch._open is None and batch._ready == [] and len(batch) == 0 and batch.step() == []


@pytest.mark.parametrize("draws_at_once", [1, 16, 17])
def test_rows_are_sampled_in_turns_if_they_need_many_draws(draws_at_once, model, monkeypatch):
    exact = SAMPLERS[1:2]  # It makes up to 8 draws for a row.
    reference = ChunkBatch(model)
    expected, _ = write(reference, join_all(reference, samplers=exact), 6)
    batch = ChunkBatch(model, BatchLimits(draws_at_once=draws_at_once))
    group_sizes, real = [], model.sample_chunks
    rows = join_all(batch, samplers=exact)
    monkeypatch.setattr(model, "sample_chunks", lambda *args: group_sizes.append(len(args[2])) or real(*args))
    texts, _ = write(batch, rows, 6)
    assert texts == expected and max(group_sizes) == max(1, draws_at_once // 8)
