"""Streams of rows: a row's numbers are its own."""

import numpy as np
import pytest
import torch

from calm.core.random import (
    DrawsInParts,
    generator_of_row,
    generators_of_rows,
    normal,
    seed_of,
    select_rows,
    uniform,
)
from calm.core.seeds import as_seed

STREAM_OF_1 = (
    3670236552952639142  # Of the tokens 5 and 6; another number would change every text that has a seed.
)


def test_a_row_draws_the_same_numbers_alone_and_in_a_batch():
    prompts = [[5, 6], [7], [5, 6, 8]]
    together = uniform(4, 3, 2, generators_of_rows(1, prompts))
    for row, prompt in enumerate(prompts):
        alone = uniform(4, 1, 2, generators_of_rows(1, [prompt]))
        assert (together[:, row] == alone[:, 0]).all()


def test_streams_differ_between_prompts_copies_and_seeds():
    generators = [*generators_of_rows(1, [[5, 6], [5, 6], [6, 5]]), *generators_of_rows(2, [[5, 6]])]
    numbers = uniform(8, 4, 1, generators)
    assert len(set(numbers.flatten().tolist())) == 32


def test_one_generator_serves_all_rows_with_different_numbers():
    numbers = uniform(3, 5, 2, torch.Generator().manual_seed(0))
    assert numbers.shape == (3, 5, 2) and len(set(numbers.flatten().tolist())) == 30
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_selected_rows_go_on_with_their_own_streams():
    whole = uniform(2, 3, 1, generators_of_rows(0, [[1], [2], [3]]))
    generators = generators_of_rows(0, [[1], [2], [3]])
    chosen = select_rows(generators, torch.tensor([2, 0]))
    assert (uniform(2, 2, 1, chosen) == whole[:, [2, 0]]).all()
    one = torch.Generator()
    assert select_rows(one, torch.tensor([1])) is one and select_rows(None, torch.tensor([1])) is None


def test_a_generator_for_every_row_is_needed():
    with pytest.raises(ValueError, match="there are 3 rows, but 2 generators"):
        uniform(1, 3, 1, [torch.Generator(), torch.Generator()])


def test_the_generator_of_a_copy_needs_no_other():
    rows = [[5, 6]] * 3
    expected = [generator.initial_seed() for generator in generators_of_rows(1, rows)]
    assert [generator_of_row(1, rows[0], copy).initial_seed() for copy in range(3)] == expected


@pytest.mark.parametrize("part", [1, 3, 7, 20])
def test_draws_in_parts_are_those_of_all_at_once(part):
    def ask(randomness, num_draws):
        """Twice, as a head with noise at several steps does."""
        return torch.cat([normal(num_draws, 2, 3, randomness), uniform(num_draws, 2, 5, randomness)], dim=-1)

    whole = ask(generators_of_rows(1, [[5], [6]]), 20)
    parts = DrawsInParts(20, generators_of_rows(1, [[5], [6]]))
    pieces = [ask(parts.begin(first), min(part, 20 - first)) for first in range(0, 20, part)]
    assert torch.equal(torch.cat(pieces), whole)


def test_a_seed_is_a_number_whatever_has_made_it():
    row, ones = [5, 6], [1, np.int64(1), np.int32(1), torch.tensor(1), np.array(1), torch.tensor([1])]
    assert {generator_of_row(one, row).initial_seed() for one in ones} == {STREAM_OF_1}
    assert len({seed_of(one, 2, "word") for one in ones}) == 1
    rows = ([5, 6], np.array([5, 6]), torch.tensor([5, 6]))
    assert {generator_of_row(1, one).initial_seed() for one in rows} == {STREAM_OF_1}
    first, second = generators_of_rows(1, [torch.tensor([5, 6]), [5, 6]])  # The second is a copy.
    assert first.initial_seed() == STREAM_OF_1 != second.initial_seed()
    assert as_seed(-(2**70)) == -(2**70)


@pytest.mark.parametrize(
    "seed", [True, np.True_, torch.tensor(True), 1.0, np.float64(1), torch.tensor(1.0), "1", b"1", [1], None]
)
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ValueError, match=r"a seed must be a whole number, got .* of type \w+\.$"):
        generators_of_rows(seed, [[5, 6]])
