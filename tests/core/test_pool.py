"""Pools: draws are equal if all their ids are, and tokens are read only where that is in doubt."""

import itertools

import pytest
import torch

from calm.core.pool import Pool
from calm.models.generation.sampler_registry import sampler_from


class Reader:
    """Takes the states for tokens, and records which of them it has read."""

    def __init__(self, chunk_size, at_once=1):
        self.chunk_size = chunk_size
        self.at_once = at_once
        self.read = []

    def __call__(self, states_MX, position):
        self.read += [(position, *state) for state in states_MX.tolist()]
        return states_MX[:, position : position + self.at_once]


def assert_numbers_agree_with_ids(numbers_RN, chunks_NRK):
    chunks_RNK = chunks_NRK.transpose(0, 1)
    equal_RNN = (chunks_RNK.unsqueeze(1) == chunks_RNK.unsqueeze(2)).all(-1)
    assert (equal_RNN == (numbers_RN.unsqueeze(1) == numbers_RN.unsqueeze(2))).all()
    assert numbers_RN.min() >= 0 and numbers_RN.max() < numbers_RN.numel()
    for first, second in itertools.combinations(numbers_RN, 2):
        assert not torch.isin(first, second).any()


@pytest.mark.parametrize("reader", [None, Reader(3), Reader(3, at_once=2), Reader(3, at_once=3)])
def test_numbers_are_equal_exactly_where_all_ids_are(reader):
    generator = torch.Generator().manual_seed(0)
    chunks_NRK = torch.randint(3, (30, 5, 3), generator=generator)
    pool = Pool(chunks_NRK[:7], reader)
    assert_numbers_agree_with_ids(pool.number(), chunks_NRK[:7])
    # A draw that was unique may now share tokens with later ones, so more of it must be read.
    pool.extend(chunks_NRK[7:])
    assert_numbers_agree_with_ids(pool.number(), chunks_NRK)
    is_kept = torch.tensor([True, False, True, True, False])
    pool.keep(is_kept)
    assert_numbers_agree_with_ids(pool.number(), chunks_NRK[:, is_kept])
    draws, rows = torch.tensor([4, 29, 0]), torch.tensor([0, 2, 2])
    assert (pool.chunks(draws, rows) == chunks_NRK[:, is_kept][draws, rows]).all()


def test_numbers_of_the_largest_ids_do_not_overflow():
    top = 2**31 - 1
    chunks = torch.tensor([[top] * 8, [top] * 7 + [top - 1], [top] * 8]).unsqueeze(1)
    first, second, third = Pool(chunks).number()[0].tolist()
    assert first == third != second


def test_only_needed_tokens_are_read_and_none_twice():
    # In row 0, the first draw is unique after one token, the next two after two tokens, and the last two are
    # equal. All draws of row 1 are unique after one token; equal draws of different rows do not count.
    row_0 = torch.tensor([[9, 1, 1], [5, 7, 2], [5, 8, 3], [5, 6, 4], [5, 6, 4]])
    row_1 = torch.tensor([[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4], [9, 1, 1]])
    reader = Reader(3)
    pool = Pool(torch.stack([row_0, row_1], dim=1), reader)
    pool.number()
    by_position = [sorted(tuple(state) for at, *state in reader.read if at == index) for index in range(3)]
    assert len(by_position[0]) == 10
    assert by_position[1] == [(5, 6, 4), (5, 6, 4), (5, 7, 2), (5, 8, 3)]
    assert by_position[2] == [(5, 6, 4), (5, 6, 4)]
    read = len(reader.read)
    pool.number()
    assert len(reader.read) == read
    assert pool.chunks(torch.tensor([0]), torch.tensor([0])).tolist() == [[9, 1, 1]]
    assert len(reader.read) == read + 2


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.5, 0.3, 0.0])
@pytest.mark.parametrize("sampler", ["exact", "pool"])
@pytest.mark.parametrize("at_once", [1, 2])
def test_lazy_reading_changes_no_sample(sampler, temperature, at_once):
    settings = sampler_from(
        temperature=temperature, sampler=sampler, num_draws=40, max_draws=40, first_block=4
    )
    results = []
    for reader in (None, Reader(3, at_once)):
        generator = torch.Generator().manual_seed(3)

        def draw(num_draws, rows, generator=generator):
            # Rows from nearly certain to wide open.
            top = torch.tensor([1.2, 2, 3, 5, 9, 20])[rows].view(1, -1, 1)
            return (torch.rand(num_draws, len(rows), 3, generator=generator) * top).long()

        results.append(settings.sample(draw, 6, torch.Generator().manual_seed(4), reader))
    for eager, lazy in zip(*results, strict=True):
        assert torch.equal(eager, lazy)
