"""Blocked argmax: the same token as from all logits at once."""

import pytest
import torch

from calm.core.argmax import argmax_of_logits


@pytest.mark.parametrize(("num_vectors", "size"), [(1, 5), (7, 2048), (3, 2049), (600, 5000), (1, 20_000)])
@pytest.mark.parametrize("logits_at_once", [1, 10_000, 2**22])
def test_same_token_as_from_all_logits(num_vectors, size, logits_at_once):
    generator = torch.Generator().manual_seed(size)
    # Small integers: logits are exact in any order of summation, and there are many ties.
    vectors = torch.randint(-3, 4, (num_vectors, 6), generator=generator).float()
    weight = torch.randint(-3, 4, (size, 6), generator=generator).float()
    expected = (vectors @ weight.T).argmax(-1)
    assert (argmax_of_logits(vectors, weight, logits_at_once) == expected).all()


def test_ties_go_to_the_smallest_token_across_slices():
    weight = torch.ones(10_000, 4)
    assert argmax_of_logits(torch.ones(3, 4), weight, 1).tolist() == [0, 0, 0]


def test_no_vectors_give_no_tokens():
    assert argmax_of_logits(torch.zeros(0, 4), torch.ones(9, 4)).shape == (0,)
