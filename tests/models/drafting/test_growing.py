"""Drafts in branches: their shape against all shapes, their tokens and distributions against the head's."""

from itertools import product

import pytest
import torch
from drafts import drafting_model
from tiny import EOS
from torch.testing import assert_close

from calm.core.branches import TEXT
from calm.models.drafting import growing
from calm.models.drafting.draft import ChunkDrafter
from calm.models.drafting.growing import best_shape, line_shape
from calm.models.generation.prompts import Prompt

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")
BEFORE = [1, 5, 6, 12, 9, 30, 4]


def ways_of(shape):
    return {(*way, number) for way, most in shape.items() for number in range(most)}


def kept_on_average(ways):
    """Tokens that stay: each way does with the product of its tokens' probabilities."""
    shares = (torch.tensor([growing._ACCEPTANCE_RATES[number] for number in way]).prod() for way in ways)
    return float(sum(shares))


def all_sets_of_ways(number, depth):
    """All sets of so many ways, each with the way that it goes on from and with the candidates before it."""
    found = {frozenset()}
    for _ in range(number):
        found = {
            ways | {way}
            for ways in found
            for length in range(1, depth + 1)
            for way in product(range(number), repeat=length)
            if way not in ways
            and (length == 1 or way[:-1] in ways)
            and (way[-1] == 0 or (*way[:-1], way[-1] - 1) in ways)
        }
    return found


@pytest.mark.parametrize(("number", "depth"), [(1, 4), (4, 1), (4, 4), (5, 2), (5, 3)])
def test_no_shape_keeps_more(number, depth):
    shapes = all_sets_of_ways(number, depth)
    ways = ways_of(best_shape(number, depth))
    assert frozenset(ways) in shapes
    assert kept_on_average(ways) == pytest.approx(max(kept_on_average(one) for one in shapes))


def test_shapes_have_as_many_tokens_as_asked_for_if_there_are_so_many():
    for number in (1, 8, 20, 50):
        assert len(ways_of(best_shape(number, 4))) == number
    assert len(ways_of(best_shape(50, 1))) == len(growing._ACCEPTANCE_RATES)
    assert ways_of(line_shape(3)) == {(0,), (0, 0), (0, 0, 0)}


@pytest.mark.parametrize("head_type", ["sequential", "decoder"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_candidates_come_from_the_heads_distributions(head_type, temperature, num_chunks):
    model = drafting_model(head_type)
    drafter = ChunkDrafter(model, temperature, num_chunks, tree_tokens=9)
    branches, distribution_at = drafter.draft(BEFORE, 99, torch.Generator().manual_seed(3), allow_tree=True)
    assert len(branches) == 9 + (4 if num_chunks == 2 else 0) + (num_chunks == 2 and 4 - branches_depth(9))
    assert (distribution_at is None) == (temperature == 0)
    for place, children in branches.children.items():
        drafted = branches.tokens_to(place)
        tokens = [branches.tokens_G[child] for child in children]
        assert len(set(tokens)) == len(tokens)
        whole = len(drafted) // 4 * 4
        state_1D = Prompt.of(model, [*BEFORE, *drafted[:whole]]).read(model)[:, -1]
        chunk_1K = torch.tensor([[*drafted[whole:], *[0] * 4][:4]])
        own_V = model.head.token_distribution(state_1D, chunk_1K, len(drafted) - whole, temperature or 1.0)[0]
        if temperature == 0:
            assert tokens == own_V.topk(len(tokens)).indices.tolist()
        else:
            assert_close(distribution_at(place), own_V, rtol=1e-9, atol=1e-12)


def branches_depth(number):
    return max(len(way) for way in ways_of(best_shape(number, 4)))


def test_a_draft_is_no_longer_than_asked_for_and_nothing_follows_an_end():
    model = drafting_model()
    for most in range(5):
        draft = ChunkDrafter(model, tree_tokens=12).draft(BEFORE, most, allow_tree=True)
        assert draft.branches.longest <= most
    with torch.no_grad():
        model.head.scores.bias[EOS] = 100.0
    draft = ChunkDrafter(model, temperature=0.0, num_chunks=2, tree_tokens=12).draft(
        BEFORE, 99, allow_tree=True
    )
    ended = [place for place, token in enumerate(draft.branches.tokens_G) if token == EOS]
    assert draft.branches.tokens_G[draft.branches.children[TEXT][0]] == EOS
    assert len(ended) > 1 and not any(place in draft.branches.children for place in ended)


def test_drafts_are_of_one_way_unless_branches_are_asked_for():
    model = drafting_model()
    for drafter, allow_tree in ((ChunkDrafter(model), False), (ChunkDrafter(model, tree_tokens=0), True)):
        assert drafter.draft(BEFORE, 99, allow_tree=allow_tree).branches.is_line
    assert not ChunkDrafter(model).draft(BEFORE, 99, allow_tree=True).branches.is_line
    assert ChunkDrafter(drafting_model("energy")).draft(BEFORE, 99, allow_tree=True).branches.is_line


def test_damaged_weights_are_told():
    for temperature in (0.0, 1.0):
        model = drafting_model()
        with torch.no_grad():
            model.head.scores.weight[7] = torch.nan
        with pytest.raises(ValueError, match="the weights may be damaged"):
            ChunkDrafter(model, temperature).draft(BEFORE, 4)
