"""Draft trees: their shape against all shapes, their tokens and distributions against the head's."""

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
TEXT_BEFORE = [1, 5, 6, 12, 9, 30, 4]


def paths_of(shape):
    """The path to each node of a shape, as the ranks of its candidates."""
    return {(*parent, rank) for parent, number in shape.items() for rank in range(number)}


def mean_accepted(paths):
    """Mean number of accepted tokens: each path is accepted with the product of its tokens' rates."""
    rates = (torch.tensor([growing._ACCEPTANCE_RATES[rank] for rank in path]).prod() for path in paths)
    return float(sum(rates))


def all_trees(num_tokens, depth):
    """All trees of this many tokens, as sets of paths: each comes with its parent and better siblings."""
    trees = {frozenset()}
    for _ in range(num_tokens):
        trees = {
            paths | {path}
            for paths in trees
            for length in range(1, depth + 1)
            for path in product(range(num_tokens), repeat=length)
            if path not in paths
            and (length == 1 or path[:-1] in paths)
            and (path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths)
        }
    return trees


@pytest.mark.parametrize(("num_tokens", "depth"), [(1, 4), (4, 1), (4, 4), (5, 2), (5, 3)])
def test_best_shape_accepts_the_most_tokens_on_average(num_tokens, depth):
    trees = all_trees(num_tokens, depth)
    paths = paths_of(best_shape(num_tokens, depth))
    assert frozenset(paths) in trees
    assert mean_accepted(paths) == pytest.approx(max(mean_accepted(tree) for tree in trees))


def test_shapes_have_the_requested_number_of_tokens_if_possible():
    for num_tokens in (1, 8, 20, 50):
        assert len(paths_of(best_shape(num_tokens, 4))) == num_tokens
    assert len(paths_of(best_shape(50, 1))) == len(growing._ACCEPTANCE_RATES)
    assert paths_of(line_shape(3)) == {(0,), (0, 0), (0, 0, 0)}


@pytest.mark.parametrize("head_type", ["sequential", "decoder"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_candidates_come_from_the_heads_distributions(head_type, temperature, num_chunks):
    model = drafting_model(head_type)
    drafter = ChunkDrafter(model, temperature, num_chunks, tree_tokens=9)
    branches, distribution_at = drafter.draft(
        TEXT_BEFORE, 99, torch.Generator().manual_seed(3), allow_tree=True
    )
    # A second chunk takes 4 tokens, and needs the first chunk's best path to be complete.
    num_added = 0 if num_chunks == 1 else 4 + 4 - tree_depth(9)
    assert len(branches) == 9 + num_added
    assert (distribution_at is None) == (temperature == 0)
    for node, children in branches.children.items():
        drafted = branches.tokens_to(node)
        tokens = [branches.tokens_G[child] for child in children]
        assert len(set(tokens)) == len(tokens)
        chunk_start = len(drafted) // 4 * 4
        state_1D = Prompt.of(model, [*TEXT_BEFORE, *drafted[:chunk_start]]).read(model)[:, -1]
        chunk_1K = torch.tensor([[*drafted[chunk_start:], *[0] * 4][:4]])
        index = len(drafted) - chunk_start
        expected_V = model.head.token_distribution(
            model.head.prepare(state_1D), chunk_1K, index, temperature or 1.0
        )[0]
        if temperature == 0:
            assert tokens == expected_V.topk(len(tokens)).indices.tolist()
        else:
            assert_close(distribution_at(node), expected_V, rtol=1e-9, atol=1e-12)


def tree_depth(num_tokens):
    return max(len(path) for path in paths_of(best_shape(num_tokens, 4)))


def test_paths_respect_the_maximum_length():
    model = drafting_model()
    for max_length in range(5):
        draft = ChunkDrafter(model, tree_tokens=12).draft(TEXT_BEFORE, max_length, allow_tree=True)
        assert draft.branches.longest <= max_length


def test_nothing_follows_eos_in_a_tree():
    model = drafting_model()
    with torch.no_grad():
        model.head.scores.bias[EOS] = 100.0
    draft = ChunkDrafter(model, temperature=0.0, num_chunks=2, tree_tokens=12).draft(
        TEXT_BEFORE, 99, allow_tree=True
    )
    ends = [node for node, token in enumerate(draft.branches.tokens_G) if token == EOS]
    assert draft.branches.tokens_G[draft.branches.children[TEXT][0]] == EOS
    assert len(ends) > 1 and not any(node in draft.branches.children for node in ends)


def test_drafts_branch_only_if_allowed_and_supported():
    model = drafting_model()
    for drafter, allow_tree in ((ChunkDrafter(model), False), (ChunkDrafter(model, tree_tokens=0), True)):
        assert drafter.draft(TEXT_BEFORE, 99, allow_tree=allow_tree).branches.is_line
    assert not ChunkDrafter(model).draft(TEXT_BEFORE, 99, allow_tree=True).branches.is_line
    assert ChunkDrafter(drafting_model("energy")).draft(TEXT_BEFORE, 99, allow_tree=True).branches.is_line


def test_damaged_weights_are_reported():
    for temperature in (0.0, 1.0):
        model = drafting_model()
        with torch.no_grad():
            model.head.scores.weight[7] = torch.nan
        with pytest.raises(ValueError, match="the weights may be damaged"):
            ChunkDrafter(model, temperature).draft(TEXT_BEFORE, 4)
