"""Blocked argmax: the same token as from all scores, in bounded memory."""

import pytest
import torch

from calm.core import argmax as argmax_module
from calm.core.argmax import Screen, argmax_of_scores


@pytest.mark.parametrize(("num_vectors", "size"), [(1, 5), (7, 2048), (3, 2049), (600, 5000), (1, 20_000)])
@pytest.mark.parametrize("scores_at_once", [1, 10_000, 2**22])
def test_same_token_as_from_all_scores(num_vectors, size, scores_at_once):
    generator = torch.Generator().manual_seed(size)
    # Small whole numbers: scores are exact in any order of summation, and ties are many.
    vectors = torch.randint(-3, 4, (num_vectors, 6), generator=generator).float()
    weight = torch.randint(-3, 4, (size, 6), generator=generator).float()
    expected = (vectors @ weight.T).argmax(-1)
    assert (argmax_of_scores(vectors, weight, scores_at_once) == expected).all()


def test_ties_go_to_the_smallest_token_across_slices():
    weight = torch.ones(10_000, 4)
    assert argmax_of_scores(torch.ones(3, 4), weight, 1).tolist() == [0, 0, 0]


def test_no_vector_gives_no_token():
    assert argmax_of_scores(torch.zeros(0, 4), torch.ones(9, 4)).shape == (0,)


def embeddings(kind, size=6000, width=32):
    """Embeddings near a subspace, without any structure, or of small whole numbers with many ties."""
    generator = torch.Generator().manual_seed(3)
    if kind == "whole":
        return torch.randint(-2, 3, (size, width), generator=generator).float()
    scale = 0.6 ** torch.arange(width) if kind == "low rank" else torch.ones(width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return (torch.randn(size, width, generator=generator) * scale) @ turn


@pytest.mark.parametrize("kind", ["low rank", "no structure", "whole"])
@pytest.mark.parametrize("rank", [1, 8, 31])
@pytest.mark.parametrize("scores_at_once", [1, 2**22])
def test_a_screen_gives_the_same_token(kind, rank, scores_at_once):
    weight = embeddings(kind)
    generator = torch.Generator().manual_seed(rank)
    vectors = torch.randn(300, 32, generator=generator).round(decimals=0 if kind == "whole" else 8)
    expected = (vectors.double() @ weight.double().T).argmax(-1)
    assert (Screen(weight, rank).argmax(vectors, scores_at_once) == expected).all()


def test_a_slice_without_any_candidate_is_passed_over():
    weight = torch.cat([torch.full((1, 4), 9.0), torch.zeros(5000, 4)])
    assert Screen(weight, 2).argmax(torch.ones(1, 4), 1).tolist() == [0]


def test_a_screen_confirms_few_tokens_where_embeddings_lie_near_a_subspace(monkeypatch):
    confirmed = []

    def count(scores, largest=argmax_module._max):
        confirmed.append(scores.numel())
        return largest(scores)

    monkeypatch.setattr(argmax_module, "_max", count)
    vectors = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    Screen(embeddings("low rank"), 8).argmax(vectors)
    bounds, scores = confirmed
    assert bounds == 10 * 6000 and 10 <= scores < 0.1 * bounds


def test_a_bound_that_is_too_low_is_found():
    """The check above can fail: without its bars the screen loses tokens."""
    screen, weight = Screen(embeddings("low rank"), 4), embeddings("low rank")
    screen.bound_VR[:, -2:] = 0
    vectors = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    assert (screen.argmax(vectors) != (vectors @ weight.T).argmax(-1)).any()


def test_a_screen_of_bfloat16_weights_scores_in_float32():
    weight = embeddings("low rank").bfloat16()
    vectors = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert (Screen(weight, 8).argmax(vectors) == (vectors.float() @ weight.float().T).argmax(-1)).all()


@pytest.mark.parametrize("rank", [0, 32, -1])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=r"must lie in 1\.\.31"):
        Screen(torch.randn(50, 32), rank)
