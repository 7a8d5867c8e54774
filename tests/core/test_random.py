"""Random streams of rows: a row draws the same numbers alone and in a batch."""

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

# Of seed 1 and the tokens 5 and 6. Another number would change every text that was generated with a seed.
STREAM_OF_1 = 3670236552952639142


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


def test_rows_that_share_a_generator_get_different_numbers():
    numbers = uniform(3, 5, 2, torch.Generator().manual_seed(0))
    assert numbers.shape == (3, 5, 2) and len(set(numbers.flatten().tolist())) == 30
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_selected_rows_continue_their_own_streams():
    all_rows = uniform(2, 3, 1, generators_of_rows(0, [[1], [2], [3]]))
    generators = generators_of_rows(0, [[1], [2], [3]])
    chosen = select_rows(generators, torch.tensor([2, 0]))
    assert (uniform(2, 2, 1, chosen) == all_rows[:, [2, 0]]).all()
    shared = torch.Generator()
    assert select_rows(shared, torch.tensor([1])) is shared and select_rows(None, torch.tensor([1])) is None


def test_too_few_generators_are_refused():
    with pytest.raises(ValueError, match="there are 3 rows, but 2 generators"):
        uniform(1, 3, 1, [torch.Generator(), torch.Generator()])


def test_generator_of_a_copy_is_made_without_the_other_copies():
    rows = [[5, 6]] * 3
    expected = [generator.initial_seed() for generator in generators_of_rows(1, rows)]
    assert [generator_of_row(1, rows[0], copy).initial_seed() for copy in range(3)] == expected


@pytest.mark.parametrize("part", [1, 3, 7, 20])
def test_draws_in_parts_equal_draws_all_at_once(part):
    def draw(randomness, num_draws):
        """Draw twice, like a head that needs noise at several steps."""
        return torch.cat([normal(num_draws, 2, 3, randomness), uniform(num_draws, 2, 5, randomness)], dim=-1)

    expected = draw(generators_of_rows(1, [[5], [6]]), 20)
    parts = DrawsInParts(20, generators_of_rows(1, [[5], [6]]))
    pieces = [draw(parts.begin(first), min(part, 20 - first)) for first in range(0, 20, part)]
    assert torch.equal(torch.cat(pieces), expected)


def test_integers_of_any_type_are_the_same_seed():
    row, seeds = [5, 6], [1, np.int64(1), np.int32(1), torch.tensor(1), np.array(1), torch.tensor([1])]
    assert {generator_of_row(seed, row).initial_seed() for seed in seeds} == {STREAM_OF_1}
    assert len({seed_of(seed, 2, "word") for seed in seeds}) == 1
    rows = ([5, 6], np.array([5, 6]), torch.tensor([5, 6]))
    assert {generator_of_row(1, tokens).initial_seed() for tokens in rows} == {STREAM_OF_1}
    first, second = generators_of_rows(1, [torch.tensor([5, 6]), [5, 6]])  # The second is a copy of the row.
    assert first.initial_seed() == STREAM_OF_1 != second.initial_seed()
    assert as_seed(-(2**70)) == -(2**70)


@pytest.mark.parametrize(
    "seed", [True, np.True_, torch.tensor(True), 1.0, np.float64(1), torch.tensor(1.0), "1", b"1", [1], None]
)
def test_seed_that_is_not_an_integer_is_refused(seed):
    with pytest.raises(ValueError, match=r"a seed must be a whole number, got .* of type \w+\.$"):
        generators_of_rows(seed, [[5, 6]])
