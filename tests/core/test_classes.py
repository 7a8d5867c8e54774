"""The two-step softmax, against torch's cross-entropy and gradients with all other classes masked."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from calm.core.classes import classes_by_neighbours, losses_in_classes

VOCABULARY, SIZE, WIDTH = 11, 4, 3  # Three classes, the last of three tokens.


def inputs(rows=40, dtype=torch.float32):
    torch.manual_seed(0)
    vectors, table, bias = (torch.randn(shape, dtype=dtype) for shape in ((rows, WIDTH), (12, WIDTH), (12,)))
    slots = torch.randint(0, VOCABULARY, (rows,))
    return [weight.requires_grad_() for weight in (vectors, table, bias)], slots


def reference(vectors, table, bias, slots):
    """Logits of all slots, with those of other classes masked."""
    logits = F.linear(vectors, table, bias)[:, :VOCABULARY]
    is_other = torch.arange(VOCABULARY) // SIZE != (slots // SIZE).unsqueeze(-1)
    return F.cross_entropy(logits.masked_fill(is_other, -torch.inf).float(), slots, reduction="none")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_losses_and_gradients_match_torch(rows, weighted):
    row_weights = torch.rand(rows) if weighted else torch.full((rows,), 0.3)
    results = []
    for loss_of in (reference, lambda *args: losses_in_classes(*args, SIZE, VOCABULARY)):
        weights, slots = inputs(rows)
        losses = loss_of(*weights, slots)
        (losses * row_weights).sum().backward()
        results.append([losses.detach(), *(weight.grad for weight in weights)])
    assert_close(results[0], results[1])


def test_no_grad_is_respected():
    weights, slots = inputs()
    with torch.no_grad():
        losses = losses_in_classes(*weights, slots, SIZE, VOCABULARY)
    assert not losses.requires_grad
    assert_close(losses, reference(*weights, slots).detach())


def test_losses_and_gradients_are_float32_under_autocast():
    weights, slots = inputs(200)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_in_classes(*weights, slots, SIZE, VOCABULARY)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and all(weight.grad.dtype == torch.float32 for weight in weights)
    assert_close(losses, reference(*weights, slots), rtol=0.03, atol=0.03)


def test_operator_passes_opcheck_and_compiles():
    weights, slots = inputs()
    compiled = torch.compile(losses_in_classes, backend="aot_eager", fullgraph=True)
    losses = compiled(*weights, slots, SIZE, VOCABULARY)
    losses.sum().backward()
    assert_close(losses, reference(*weights, slots))
    torch.library.opcheck(torch.ops.calm.losses_in_classes.default, (*weights, slots, SIZE, VOCABULARY, True))


def test_tokens_with_similar_neighbours_share_a_class():
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
def test_every_token_is_in_exactly_one_class(vocab_size, size):
    for counts in (torch.rand(vocab_size, 6), torch.zeros(vocab_size, 6), torch.zeros(vocab_size, 1)):
        assert sorted(classes_by_neighbours(counts, size).tolist()) == list(range(vocab_size))
