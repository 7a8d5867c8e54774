"""Prompts are read together, in pieces, and not again, and the rows write what each would write alone."""

import itertools

import pytest
import torch
from tiny import tiny_model

from calm.models.generation.batching import BatchLimits, ChunkBatch
from calm.models.generation.prefixes import PrefixStore
from calm.models.generation.prompts import Prompt
from calm.models.generation.reading import PromptReader
from calm.models.generation.rows import Row
from calm.models.generation.sampler_registry import sampler_from
from calm.models.generation.slots import SlotCache


@pytest.fixture
def model():
    model = tiny_model(backbone_config={"max_position_embeddings": 512})
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


class Counting:
    """Chunks of every row (rows, columns) that the backbone reads, call by call."""

    def __init__(self, model, monkeypatch):
        self.shapes, real = [], model.backbone.forward
        monkeypatch.setattr(model.backbone, "forward", lambda **own: self._note(own) or real(**own))

    def _note(self, own):
        self.shapes.append(tuple(own["inputs_embeds"].shape[:2]))


def prompts(lengths, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (length,), generator=chance).tolist() for length in lengths]


def row_of():
    return Row(sampler_from(), 8, torch.Generator())


def states_of(model, tokens):
    return Prompt.of(model, tokens).read(model)[:, -1]


def read_all(reader, most):
    """State of each row, in the order in which they are ready."""
    states = {}
    while len(reader):
        ready, failed = reader.read(most)
        assert not failed
        for part in ready:
            states |= {
                row: (part.hidden_RD[place], part.cache.lengths[place]) for place, row in enumerate(part.rows)
            }
    return states


@pytest.mark.parametrize("most", [1, 3, 16, 1000])
@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20])
@torch.no_grad()
def test_pieces_say_what_the_whole_says(most, prefix_bytes, model):
    """Prompts of all lengths, some with a beginning in common, whatever fits in a piece."""
    reader = PromptReader(model, PrefixStore(prefix_bytes))
    shared = prompts([96])[0]
    others = [shared + [7] * 8, shared, shared + [9] * 16, [5] * 3 + shared]
    texts = [*prompts([1, 3, 4, 5, 64, 130], seed=1), *others]
    rows = [row_of() for _ in texts]
    for repeated in range(2):  # The second time, beginnings may be known.
        for row, text in zip(rows, texts, strict=True):
            reader.add(row, text)
        states = read_all(reader, most)
        for row, text in zip(rows, texts, strict=True):
            state, length = states[row]
            assert length == -(-len(text) // 4)
            torch.testing.assert_close(
                state, states_of(model, text)[0], rtol=1e-4, atol=1e-4, msg=f"{repeated}"
            )


def test_short_prompts_do_not_wait_for_a_long_one(model, monkeypatch):
    batch = ChunkBatch(model, BatchLimits(chunks_at_once=4))
    settings = sampler_from()
    writing = batch.join([5, 6, 7], settings, 400, 0)
    batch.step()
    long, short = prompts([400, 8])
    read = Counting(model, monkeypatch)
    rows = [batch.join(long, settings, 8, 1), batch.join(short, settings, 8, 2)]
    begun = {}
    for step in range(40):
        for one in batch.step():
            begun.setdefault(one.row, step)
        assert all(rows * columns <= 4 for rows, columns in read.shapes)
        assert writing.budget == 400 - 4 * (step + 2), "a row waited"
    assert begun[rows[1]] == 0 and begun[rows[0]] == 25  # A hundred chunks, and one turn of the short one.


def num_begun(reader):
    return sum(reading.cache is not None for reading in reader._queue)


@torch.no_grad()
def test_long_prompts_are_read_one_after_another(model):
    reader = PromptReader(model, PrefixStore(0))
    rows = [row_of() for _ in range(4)]
    for row, text in zip(rows, prompts([160] * 4), strict=True):
        reader.add(row, text)
    ready_at = {}
    for piece in range(20):
        ready, _ = reader.read(8)
        ready_at |= {part.rows[0]: piece for part in ready}
        assert num_begun(reader) <= 1
    assert [ready_at[row] for row in rows] == [4, 9, 14, 19]


@torch.no_grad()
def test_prompts_that_are_read_together_stay_in_the_order_in_which_they_came(model):
    reader, rows = PromptReader(model, PrefixStore(0)), [row_of() for _ in range(4)]
    for row, text in zip(rows, prompts([20, 8, 40, 12]), strict=True):
        reader.add(row, text)
    ready, _ = reader.read(1000)
    assert [part.rows for part in ready] == [[row] for row in rows]


@torch.no_grad()
def test_no_more_than_four_prompts_lie_partly_read_in_memory(model, monkeypatch):
    """Each is shorter than those before it and overtakes them while it may; one that fits in a piece may."""
    reader = PromptReader(model, PrefixStore(0))
    read, most, finished = Counting(model, monkeypatch), 0, set()
    for length in range(800, 200, -60):
        reader.add(row_of(), prompts([length])[0])
        reader.read(8)
        most = max(most, num_begun(reader))
    assert most == 4
    short = row_of()
    reader.add(short, [5] * 8)
    while short not in finished:
        finished |= {part.rows[0] for part in reader.read(8)[0]}
    assert len(finished) == 1
    while len(reader):
        reader.read(8)
        assert num_begun(reader) <= 4
    assert all(rows * columns <= 8 for rows, columns in read.shapes)


@pytest.mark.parametrize("length", [12, 60])
@torch.no_grad()
def test_a_long_prompt_gets_every_fourth_piece_however_many_short_ones_come(length, model):
    """Those that come fill a piece each, or are long themselves."""
    reader, long = PromptReader(model, PrefixStore(0)), row_of()
    reader.add(long, prompts([160])[0])
    is_ready = False
    for piece in range(4 * 5):
        for number in range(2):
            reader.add(row_of(), prompts([length], seed=2 * piece + number)[0])
        ready, _ = reader.read(8)
        is_ready = is_ready or any(long in part.rows for part in ready)
    assert is_ready


@torch.no_grad()
def test_a_prompt_whose_beginning_is_known_is_a_short_one(model):
    reader = PromptReader(model, PrefixStore(1 << 20))
    known, middle = prompts([320, 80])
    reader.add(row_of(), known)
    read_all(reader, 1000)
    rows = [row_of(), row_of()]
    reader.add(rows[0], middle)
    reader.add(rows[1], [*known, *[5] * 8])
    [part], _ = reader.read(16)
    assert part.rows == [rows[1]] and num_begun(reader) == 0


def test_prompts_of_rows_without_a_place_are_read_together_once_there_is_one(model, monkeypatch):
    """And rows that begin take the places of those that ended: nothing is put together anew."""
    batch, settings = ChunkBatch(model, BatchLimits(max_rows=2)), sampler_from()
    budgets = [8, 12, 8, 4, 8, 12, 4]
    for seed, budget in enumerate(budgets[:2]):
        batch.join([5 + seed] * 6, settings, budget, seed)
    batch.step()
    read, joined, real = Counting(model, monkeypatch), [], SlotCache.concat.__func__
    monkeypatch.setattr(SlotCache, "concat", classmethod(lambda *own: joined.append(1) or real(*own)))
    for seed, budget in enumerate(budgets[2:], 2):
        batch.join([5 + seed] * (4 * seed), settings, budget, seed)
    assert len(batch) == len(budgets)
    written = [one for _ in range(7) for one in batch.step()]
    assert (
        read.shapes == [(5, 6)] and len(joined) == 1
    )  # Only for the first: nothing was ready when it ended.
    assert len(batch) == 0 and sum(len(one.tokens) for one in written) == sum(budgets) - 8


def test_nobody_waits_so_a_prompt_is_read_at_once(model, monkeypatch):
    read = Counting(model, monkeypatch)
    batch = ChunkBatch(model, BatchLimits(chunks_at_once=8))
    batch.join(prompts([400])[0], sampler_from(), 8, 1)
    assert batch.step() and read.shapes == [(1, 100)]


def test_equal_prompts_are_read_once(model, monkeypatch):
    [prompt], read = prompts([30]), Counting(model, monkeypatch)
    batch = ChunkBatch(model)
    rows = [batch.join(prompt, sampler_from(), 8, 3, copy) for copy in range(5)]
    written = {one.row: one.tokens for one in batch.step()}
    assert read.shapes == [(1, 8)] and set(written) == set(rows)
    first = model.generate(torch.tensor([prompt] * 5), max_new_tokens=4, seed=3, temperature=1.0)[:, 30:]
    assert [written[row] for row in rows] == first.tolist()


def test_a_known_beginning_is_not_read_again(model, monkeypatch):
    [beginning], read = prompts([256]), Counting(model, monkeypatch)
    batch = ChunkBatch(model)
    for number in range(3):
        batch.join([*beginning, *[5 + number] * 8], sampler_from(), 4, number)
        batch.step()
    assert read.shapes == [(1, 66), (1, 2), (1, 2)]
    read.shapes.clear()
    batch.join([*beginning, *[5] * 8], sampler_from(), 4, 0)  # All of it is known; its last state is needed.
    batch.step()
    assert read.shapes == [(1, 2)]
    read.shapes.clear()
    batch.join([*beginning[:-1], *[5] * 8], sampler_from(), 4, 0)  # Cut into other chunks.
    batch.step()
    assert read.shapes == [(1, 66)]


def test_beginnings_that_were_not_used_for_the_longest_are_forgotten(model):
    reader = PromptReader(model, PrefixStore(0))
    caches, texts = [], [torch.tensor(text).view(-1, 4) for text in prompts([64, 64, 64])]
    for text in texts:
        reader.add(row_of(), text.flatten().tolist())
        [part], _ = reader.read(1000)
        caches.append(part.cache)
    of_a_block = 8 * 2 * sum(keys[0].nbytes for keys, _ in caches[0].chunks(0, 1))
    store = PrefixStore(4 * of_a_block)
    longer = [torch.cat([text, text[:1]]) for text in texts]  # The last chunk is never taken from a store.
    for number in (0, 1):
        store.keep(texts[number], caches[number])
    assert store.find(longer[0]).lengths == [16]  # Now the second was not used for longer.
    store.keep(texts[2], caches[2])
    assert store.find(longer[1]) is None
    assert store.find(longer[0]).lengths == store.find(longer[2]).lengths == [16]
    small = PrefixStore(of_a_block)
    small.keep(texts[0], caches[0])
    assert small.find(longer[0]).lengths == [8]  # The end went first: without its beginning nothing is found.


def size_of(block):
    return sum(states.nbytes for layer in block for states in layer)


def read_one(model, text):
    """The chunks of a prompt, and what is read of them."""
    reader = PromptReader(model, PrefixStore(0))
    reader.add(row_of(), text)
    [part], _ = reader.read(1000)
    return torch.tensor(text).view(-1, 4), part.cache


def test_what_is_kept_never_exceeds_its_memory(model, monkeypatch):
    """And a prompt that is larger than all of it throws out no other."""
    short, other, long = (read_one(model, text) for text in prompts([64, 32, 400]))
    store = PrefixStore(4 * size_of(short[1].chunks(0, 8)))
    held, real = [], SlotCache.chunks

    def chunks(*own):
        held.append(sum(size_of(block) for block in store._blocks.values()))
        return real(*own)

    monkeypatch.setattr(SlotCache, "chunks", chunks)
    for text, cache in (short, other, long, short, long):
        store.keep(text, cache)
    assert max(held) <= store._max_bytes
    longer = [torch.cat([text, text[:1]]) for text, _ in (short, other, long)]
    assert [store.find(text).lengths for text in longer] == [[16], [8], [8]]


def test_those_of_before_leave_for_a_prompt_that_fits(model):
    short, long = (read_one(model, text) for text in prompts([64, 96]))
    store = PrefixStore(3 * size_of(short[1].chunks(0, 8)))
    store.keep(*short)
    store.keep(*long)
    assert store.find(torch.cat([short[0], short[0][:1]])) is None
    assert store.find(torch.cat([long[0], long[0][:1]])).lengths == [24]


@pytest.mark.parametrize(("owner", "name"), [(SlotCache, "chunks"), (PrefixStore, "_touch")])
def test_a_text_is_written_where_its_beginning_cannot_be_kept_or_found(
    owner, name, model, monkeypatch, caplog
):
    def fail(*_):
        raise MemoryError

    [text] = prompts([64])
    batch, other = ChunkBatch(model), ChunkBatch(model)
    for each in (batch, other):
        each.join(text[:32], sampler_from(), 4, 0)
        each.step()
    rows = [each.join(text, sampler_from(), 4, 0) for each in (batch, other)]
    [expected] = other.step()
    monkeypatch.setattr(owner, name, fail)
    [written] = batch.step()
    assert (written.row, written.tokens) == (rows[0], expected.tokens) and "prefix" in caplog.text


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_no_prompt_is_read_twice_if_memory_is_short_once(failing, model, monkeypatch):
    """As what was read of several is stored, one by one."""
    settings, texts = sampler_from(), prompts([24, 22, 24])
    batch = ChunkBatch(model)
    rows = [batch.join(text, settings, 4, seed) for seed, text in enumerate(texts)]
    real, calls = SlotCache.select, itertools.count(1)

    def select(*own):
        if next(calls) == failing:
            raise MemoryError
        return real(*own)

    monkeypatch.setattr(SlotCache, "select", select)
    written = {one.row: one.tokens for one in batch.step()}
    for seed, (row, text) in enumerate(zip(rows, texts, strict=True)):
        alone = model.generate(torch.tensor([text]), max_new_tokens=4, seed=seed, temperature=1.0)
        assert written[row] == alone[0, len(text) :].tolist()


def test_a_row_whose_prompt_is_read_can_be_dropped(model):
    batch, [prompt] = ChunkBatch(model, BatchLimits(chunks_at_once=1)), prompts([300])
    rows = [batch.join(prompt, sampler_from(), 8, seed) for seed in range(2)]
    batch.step()
    batch.drop(rows[0])
    assert len(batch) == 1
    batch.drop(rows[1])
    assert len(batch) == 0 and batch.step() == []


@pytest.mark.parametrize("head_type", ["energy", "sequential"])
def test_layers_that_no_lean_step_may_pass_by(head_type):
    """Their forward pass writes the same, and their hooks are called for every chunk."""
    model = tiny_model(head_config={"head_type": head_type})
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    texts, settings, calls = prompts([3, 17, 8]), sampler_from(), []
    expected = [
        model.generate(torch.tensor([text]), max_new_tokens=16, seed=1, sampler=settings)[
            0, len(text) :
        ].tolist()
        for text in texts
    ]
    model.backbone.layers[0].register_forward_hook(lambda *_: calls.append(1))
    batch = ChunkBatch(model)
    rows = [batch.join(text, settings, 16, 1) for text in texts]
    written = {row: [] for row in rows}
    for _ in range(4):
        for one in batch.step():
            written[one.row] += one.tokens
    assert [written[row] for row in rows] == expected
    assert len(calls) == 4  # The prompts together, and three steps.
