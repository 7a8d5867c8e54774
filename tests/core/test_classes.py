"""A softmax in two steps, against one over all tokens of a class, and torch's own gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from calm.core.classes import classes_by_neighbours, losses_in_classes

VOCABULARY, SIZE, WIDTH = 11, 4, 3  # Three classes, the last of three tokens.


def inputs(rows=40, dtype=torch.float32):
    torch.manual_seed(0)
    vectors, table, bias = (torch.randn(shape, dtype=dtype) for shape in ((rows, WIDTH), (12, WIDTH), (12,)))
    places = torch.randint(0, VOCABULARY, (rows,))
    return [part.requires_grad_() for part in (vectors, table, bias)], places


def plainly(vectors, table, bias, places):
    """Scores of all places, and those of other classes left out."""
    scores = F.linear(vectors, table, bias)[:, :VOCABULARY]
    is_other = torch.arange(VOCABULARY) // SIZE != (places // SIZE).unsqueeze(-1)
    return F.cross_entropy(scores.masked_fill(is_other, -torch.inf).float(), places, reduction="none")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_losses_and_gradients_are_those_of_the_scores(rows, weighted):
    weights = torch.rand(rows) if weighted else torch.full((rows,), 0.3)
    found = []
    for loss_of in (plainly, lambda *given: losses_in_classes(*given, SIZE, VOCABULARY)):
        parts, places = inputs(rows)
        losses = loss_of(*parts, places)
        (losses * weights).sum().backward()
        found.append([losses.detach(), *(part.grad for part in parts)])
    assert_close(found[0], found[1])


def test_nothing_is_kept_where_no_gradient_is_wanted():
    parts, places = inputs()
    with torch.no_grad():
        losses = losses_in_classes(*parts, places, SIZE, VOCABULARY)
    assert not losses.requires_grad
    assert_close(losses, plainly(*parts, places).detach())


def test_half_precision_is_that_of_autocast():
    parts, places = inputs(200)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_in_classes(*parts, places, SIZE, VOCABULARY)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and all(part.grad.dtype == torch.float32 for part in parts)
    assert_close(losses, plainly(*parts, places), rtol=0.03, atol=0.03)


def test_compilers_need_not_look_into_it():
    parts, places = inputs()
    whole = torch.compile(losses_in_classes, backend="aot_eager", fullgraph=True)
    losses = whole(*parts, places, SIZE, VOCABULARY)
    losses.sum().backward()
    assert_close(losses, plainly(*parts, places))
    torch.library.opcheck(torch.ops.calm.losses_in_classes.default, (*parts, places, SIZE, VOCABULARY, True))


def test_tokens_with_like_neighbours_are_together():
    torch.manual_seed(0)
    kinds = torch.randperm(48) % 6  # Six kinds of tokens, each with neighbours of its own.
    counts = torch.zeros(48, 30)
    for token, kind in enumerate(kinds):
        counts[token, 5 * kind : 5 * kind + 5] = torch.randint(5, 50, (5,)).float()
    order = classes_by_neighbours(counts, 8)
    assert sorted(order.tolist()) == list(range(48))
    assert all(len(set(kinds[row].tolist())) == 1 for row in order.view(6, 8))
    assert torch.equal(order, classes_by_neighbours(counts, 8))


@pytest.mark.parametrize(("vocab_size", "size"), [(11, 4), (5, 5), (7, 1), (1, 1)])
def test_every_token_has_one_place(vocab_size, size):
    for counts in (torch.rand(vocab_size, 6), torch.zeros(vocab_size, 6), torch.zeros(vocab_size, 1)):
        assert sorted(classes_by_neighbours(counts, size).tolist()) == list(range(vocab_size))
