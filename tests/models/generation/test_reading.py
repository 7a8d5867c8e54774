"""Prompts are read together, in pieces and only once; rows write what each would write alone."""

import itertools

import pytest
import torch
from recorders import BackboneCalls
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


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]


def new_row():
    return Row(sampler_from(), 8, torch.Generator())


def last_state(model, tokens):
    return Prompt.of(model, tokens).read(model)[:, -1]


def read_all(reader, chunks_at_once):
    """The last state of each row and its number of chunks, in the order in which rows are ready."""
    states = {}
    while len(reader):
        ready, failed = reader.read(chunks_at_once)
        assert not failed
        for part in ready:
            states |= {
                row: (part.hidden_RD[index], part.cache.lengths[index]) for index, row in enumerate(part.rows)
            }
    return states


@pytest.mark.parametrize("chunks_at_once", [1, 3, 16, 1000])
@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20])
@torch.no_grad()
def test_prompts_read_in_pieces_have_the_states_of_whole_prompts(chunks_at_once, prefix_bytes, model):
    """Prompts of many lengths, some with a common prefix, in pieces of several sizes."""
    reader = PromptReader(model, PrefixStore(prefix_bytes))
    shared = random_prompts([96])[0]
    others = [shared + [7] * 8, shared, shared + [9] * 16, [5] * 3 + shared]
    texts = [*random_prompts([1, 3, 4, 5, 64, 130], seed=1), *others]
    rows = [new_row() for _ in texts]
    for repeated in range(2):  # The second time, prefixes may be cached.
        for row, text in zip(rows, texts, strict=True):
            reader.add(row, text)
        states = read_all(reader, chunks_at_once)
        for row, text in zip(rows, texts, strict=True):
            state, length = states[row]
            assert length == -(-len(text) // 4)
            torch.testing.assert_close(
                state, last_state(model, text)[0], rtol=1e-4, atol=1e-4, msg=f"{repeated}"
            )


def test_short_prompts_do_not_wait_for_a_long_one(model, monkeypatch):
    batch = ChunkBatch(model, BatchLimits(chunks_at_once=4))
    sampler = sampler_from()
    writing = batch.join([5, 6, 7], sampler, 400, 0)
    batch.step()
    long, short = random_prompts([400, 8])
    calls = BackboneCalls(model, monkeypatch)
    rows = [batch.join(long, sampler, 8, 1), batch.join(short, sampler, 8, 2)]
    first_step = {}
    for step in range(40):
        for result in batch.step():
            first_step.setdefault(result.row, step)
        assert all(rows * columns <= 4 for rows, columns in calls.shapes)
        assert writing.budget == 400 - 4 * (step + 2), "a row waited"
    assert first_step[rows[1]] == 0
    assert first_step[rows[0]] == 25  # 25 pieces for its 100 chunks, after one of the short prompt.


def num_partly_read(reader):
    return sum(reading.cache is not None for reading in reader._queue)


@torch.no_grad()
def test_long_prompts_are_read_one_after_another(model):
    reader = PromptReader(model, PrefixStore(0))
    rows = [new_row() for _ in range(4)]
    for row, text in zip(rows, random_prompts([160] * 4), strict=True):
        reader.add(row, text)
    ready_at = {}
    for piece in range(20):
        ready, _ = reader.read(8)
        ready_at |= {part.rows[0]: piece for part in ready}
        assert num_partly_read(reader) <= 1
    assert [ready_at[row] for row in rows] == [4, 9, 14, 19]


@torch.no_grad()
def test_prompts_that_are_read_together_stay_in_order(model):
    reader, rows = PromptReader(model, PrefixStore(0)), [new_row() for _ in range(4)]
    for row, text in zip(rows, random_prompts([20, 8, 40, 12]), strict=True):
        reader.add(row, text)
    ready, _ = reader.read(1000)
    assert [part.rows for part in ready] == [[row] for row in rows]


@torch.no_grad()
def test_at_most_four_prompts_are_partly_read(model, monkeypatch):
    """Each is shorter than those before, so it overtakes them if it may; a prompt of one piece always may."""
    reader = PromptReader(model, PrefixStore(0))
    calls, largest, finished = BackboneCalls(model, monkeypatch), 0, set()
    for length in range(800, 200, -60):
        reader.add(new_row(), random_prompts([length])[0])
        reader.read(8)
        largest = max(largest, num_partly_read(reader))
    assert largest == 4
    short = new_row()
    reader.add(short, [5] * 8)
    while short not in finished:
        finished |= {part.rows[0] for part in reader.read(8)[0]}
    assert len(finished) == 1
    while len(reader):
        reader.read(8)
        assert num_partly_read(reader) <= 4
    assert all(rows * columns <= 8 for rows, columns in calls.shapes)


@pytest.mark.parametrize("length", [12, 60])
@torch.no_grad()
def test_long_prompt_gets_every_fourth_piece_however_many_arrive(length, model):
    """The prompts that arrive fill a piece each, or are long themselves."""
    reader, long = PromptReader(model, PrefixStore(0)), new_row()
    reader.add(long, random_prompts([160])[0])
    is_ready = False
    for piece in range(4 * 5):
        for index in range(2):
            reader.add(new_row(), random_prompts([length], seed=2 * piece + index)[0])
        ready, _ = reader.read(8)
        is_ready = is_ready or any(long in part.rows for part in ready)
    assert is_ready


@torch.no_grad()
def test_prompt_with_a_cached_prefix_counts_as_short(model):
    reader = PromptReader(model, PrefixStore(1 << 20))
    cached, middle = random_prompts([320, 80])
    reader.add(new_row(), cached)
    read_all(reader, 1000)
    rows = [new_row(), new_row()]
    reader.add(rows[0], middle)
    reader.add(rows[1], [*cached, *[5] * 8])
    [part], _ = reader.read(16)
    assert part.rows == [rows[1]] and num_partly_read(reader) == 0


def test_prompts_of_waiting_rows_are_read_together_once_a_slot_is_free(model, monkeypatch):
    """New rows take over the slots of those that ended, so hardly any caches are concatenated."""
    batch, sampler = ChunkBatch(model, BatchLimits(max_rows=2)), sampler_from()
    budgets = [8, 12, 8, 4, 8, 12, 4]
    for seed, budget in enumerate(budgets[:2]):
        batch.join([5 + seed] * 6, sampler, budget, seed)
    batch.step()
    calls, concatenated, real = BackboneCalls(model, monkeypatch), [], SlotCache.concat.__func__
    monkeypatch.setattr(SlotCache, "concat", classmethod(lambda *args: concatenated.append(1) or real(*args)))
    for seed, budget in enumerate(budgets[2:], 2):
        batch.join([5 + seed] * (4 * seed), sampler, budget, seed)
    assert len(batch) == len(budgets)
    results = [result for _ in range(7) for result in batch.step()]
    assert calls.shapes == [(5, 6)]
    assert len(concatenated) == 1  # For the first row that ended: none was ready to take over its slot.
    assert len(batch) == 0 and sum(len(result.tokens) for result in results) == sum(budgets) - 8


def test_prompt_is_read_in_one_piece_if_no_row_is_being_written(model, monkeypatch):
    calls = BackboneCalls(model, monkeypatch)
    batch = ChunkBatch(model, BatchLimits(chunks_at_once=8))
    batch.join(random_prompts([400])[0], sampler_from(), 8, 1)
    assert batch.step() and calls.shapes == [(1, 100)]


def test_equal_prompts_are_read_once(model, monkeypatch):
    [prompt], calls = random_prompts([30]), BackboneCalls(model, monkeypatch)
    batch = ChunkBatch(model)
    rows = [batch.join(prompt, sampler_from(), 8, 3, copy) for copy in range(5)]
    written = {result.row: result.tokens for result in batch.step()}
    assert calls.shapes == [(1, 8)] and set(written) == set(rows)
    first = model.generate(torch.tensor([prompt] * 5), max_new_tokens=4, seed=3, temperature=1.0)[:, 30:]
    assert [written[row] for row in rows] == first.tolist()


def test_cached_prefix_is_not_read_again(model, monkeypatch):
    [prefix], calls = random_prompts([256]), BackboneCalls(model, monkeypatch)
    batch = ChunkBatch(model)
    for index in range(3):
        batch.join([*prefix, *[5 + index] * 8], sampler_from(), 4, index)
        batch.step()
    assert calls.shapes == [(1, 66), (1, 2), (1, 2)]
    calls.shapes.clear()
    # A prompt that is cached as a whole: the state after it is still needed.
    batch.join([*prefix, *[5] * 8], sampler_from(), 4, 0)
    batch.step()
    assert calls.shapes == [(1, 2)]
    calls.shapes.clear()
    batch.join([*prefix[:-1], *[5] * 8], sampler_from(), 4, 0)  # It is split into other chunks.
    batch.step()
    assert calls.shapes == [(1, 66)]


def test_least_recently_used_prefixes_are_evicted(model):
    reader = PromptReader(model, PrefixStore(0))
    caches, texts = [], [torch.tensor(text).view(-1, 4) for text in random_prompts([64, 64, 64])]
    for text in texts:
        reader.add(new_row(), text.flatten().tolist())
        [part], _ = reader.read(1000)
        caches.append(part.cache)
    block_bytes = 8 * 2 * sum(keys[0].nbytes for keys, _ in caches[0].chunks(0, 1))
    store = PrefixStore(4 * block_bytes)
    longer = [torch.cat([text, text[:1]]) for text in texts]  # The last chunk of a prompt is never cached.
    for index in (0, 1):
        store.keep(texts[index], caches[index])
    assert store.find(longer[0]).lengths == [16]  # Now the second is the least recently used.
    store.keep(texts[2], caches[2])
    assert store.find(longer[1]) is None
    assert store.find(longer[0]).lengths == store.find(longer[2]).lengths == [16]
    small = PrefixStore(block_bytes)
    small.keep(texts[0], caches[0])
    assert small.find(longer[0]).lengths == [8]  # Of a prompt that is too long, the beginning is kept.


def size_of(block):
    return sum(states.nbytes for layer in block for states in layer)


def read_prompt(model, text):
    """The chunks of a prompt, and their cache."""
    reader = PromptReader(model, PrefixStore(0))
    reader.add(new_row(), text)
    [part], _ = reader.read(1000)
    return torch.tensor(text).view(-1, 4), part.cache


def test_prefix_store_never_exceeds_its_memory(model, monkeypatch):
    """And a prompt larger than all of it evicts no others."""
    short, other, long = (read_prompt(model, text) for text in random_prompts([64, 32, 400]))
    store = PrefixStore(4 * size_of(short[1].chunks(0, 8)))
    sizes, real = [], SlotCache.chunks

    def chunks(*args):
        sizes.append(sum(size_of(block) for block in store._blocks.values()))
        return real(*args)

    monkeypatch.setattr(SlotCache, "chunks", chunks)
    for text, cache in (short, other, long, short, long):
        store.keep(text, cache)
    assert max(sizes) <= store._max_bytes
    longer = [torch.cat([text, text[:1]]) for text, _ in (short, other, long)]
    assert [store.find(text).lengths for text in longer] == [[16], [8], [8]]


def test_older_prefixes_are_evicted_for_a_prompt_that_fits(model):
    short, long = (read_prompt(model, text) for text in random_prompts([64, 96]))
    store = PrefixStore(3 * size_of(short[1].chunks(0, 8)))
    store.keep(*short)
    store.keep(*long)
    assert store.find(torch.cat([short[0], short[0][:1]])) is None
    assert store.find(torch.cat([long[0], long[0][:1]])).lengths == [24]


@pytest.mark.parametrize(("owner", "name"), [(SlotCache, "chunks"), (PrefixStore, "_touch")])
def test_text_is_written_if_its_prefix_cannot_be_cached_or_found(owner, name, model, monkeypatch, caplog):
    def fail(*_):
        raise MemoryError

    [text] = random_prompts([64])
    batch, reference = ChunkBatch(model), ChunkBatch(model)
    for either in (batch, reference):
        either.join(text[:32], sampler_from(), 4, 0)
        either.step()
    rows = [either.join(text, sampler_from(), 4, 0) for either in (batch, reference)]
    [expected] = reference.step()
    monkeypatch.setattr(owner, name, fail)
    [written] = batch.step()
    assert (written.row, written.tokens) == (rows[0], expected.tokens) and "prefix" in caplog.text


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_no_prompt_is_read_twice_if_memory_runs_out_once(failing, model, monkeypatch):
    """It fails while what was read of several prompts is stored; what is read twice would change the text."""
    sampler, texts = sampler_from(), random_prompts([24, 22, 24])
    batch = ChunkBatch(model)
    rows = [batch.join(text, sampler, 4, seed) for seed, text in enumerate(texts)]
    real, calls = SlotCache.select, itertools.count(1)

    def select(*args):
        if next(calls) == failing:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(SlotCache, "select", select)
    written = {result.row: result.tokens for result in batch.step()}
    for seed, (row, text) in enumerate(zip(rows, texts, strict=True)):
        alone = model.generate(torch.tensor([text]), max_new_tokens=4, seed=seed, temperature=1.0)
        assert written[row] == alone[0, len(text) :].tolist()


def test_row_can_be_dropped_while_its_prompt_is_read(model):
    batch, [prompt] = ChunkBatch(model, BatchLimits(chunks_at_once=1)), random_prompts([300])
    rows = [batch.join(prompt, sampler_from(), 8, seed) for seed in range(2)]
    batch.step()
    batch.drop(rows[0])
    assert len(batch) == 1
    batch.drop(rows[1])
    assert len(batch) == 0 and batch.step() == []


@pytest.mark.parametrize("head_type", ["energy", "sequential"])
def test_layers_with_hooks_run_their_forward_pass(head_type):
    """The text is the same, and the hooks are called for every chunk."""
    model = tiny_model(head_config={"head_type": head_type})
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    texts, sampler, calls = random_prompts([3, 17, 8]), sampler_from(), []
    expected = [
        model.generate(torch.tensor([text]), max_new_tokens=16, seed=1, sampler=sampler)[
            0, len(text) :
        ].tolist()
        for text in texts
    ]
    model.backbone.layers[0].register_forward_hook(lambda *_: calls.append(1))
    batch = ChunkBatch(model)
    rows = [batch.join(text, sampler, 16, 1) for text in texts]
    written = {row: [] for row in rows}
    for _ in range(4):
        for result in batch.step():
            written[result.row] += result.tokens
    assert [written[row] for row in rows] == expected
    assert len(calls) == 4  # The prompts together, and three steps.
