"""The parallel head: one pass, independent tokens, and Brier scores in closed form."""

import itertools

import pytest
import torch
from tiny import HEADS, tiny_model
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from calm.core.brier import brier_losses, brier_scores_of_draws
from calm.models.heads import Target

PARALLEL = HEADS["parallel"]


def head_of(vocab_size=5, chunk_size=2, **fields):
    torch.manual_seed(1)
    model = tiny_model(chunk_size, vocab_size=vocab_size, head_config=PARALLEL | fields).double()
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.normal_(std=0.4)  # So that several tokens are likely.
    return model.head, torch.randn(4, 32 + chunk_size * 5, dtype=torch.float64)


@pytest.mark.parametrize("classes", [1, 2])
def test_brier_loss_matches_the_enumeration(classes):
    """For each n, the sum of P(x)^2 over all prefixes x of n tokens, minus 2 P(y) for that of the target."""
    head, states = head_of(num_classes=classes)
    chunks = torch.tensor(list(itertools.product(range(5), repeat=2)))
    with torch.no_grad():
        for state in states:
            p_K = (-head.token_losses(state.expand(len(chunks), -1), chunks)).exp()
            for y in chunks[[0, 9, 17]]:
                expected = []
                for n in (1, 2):
                    prefixes = {tuple(x[:n].tolist()): p[:n].prod() for x, p in zip(chunks, p_K, strict=True)}
                    squares = sum(p**2 for p in prefixes.values())
                    expected.append(squares - 2 * prefixes[tuple(y[:n].tolist())])
                head.config.loss = "brier"
                loss = head.loss(state[None], Target(None, y[None]))
                head.config.loss = "cross_entropy"
                assert_close(loss.double(), torch.stack(expected).mean()[None].double(), atol=1e-6, rtol=1e-5)


def test_brier_scores_of_draws_match_the_closed_form():
    head, states = head_of()
    y = torch.tensor([[1, 2]])
    with torch.no_grad():
        figures = head.token_probabilities(states[:1], y)
        exact = -brier_losses(figures.of_token_PK, figures.of_pair_PK)
        draws = head.draw_chunks(head.prepare(states[:1]), 4000, torch.Generator().manual_seed(2))
    assert_close(brier_scores_of_draws(draws, y), exact.float(), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("classes", [1, 2])
def test_tokens_are_drawn_independently_from_their_distributions(classes, temperature):
    """Pairs are as frequent as the products of their probabilities; at T = 0 they are the likeliest."""
    head, states = head_of(num_classes=classes)
    with torch.no_grad():
        prepared = head.prepare(states[:1])
        pairs = head.draw_chunks(prepared, 20_000, torch.Generator().manual_seed(3), temperature)[:, 0]
        first, second = (
            head.token_distribution(prepared, pairs[:1], index, temperature or 0.01)[0] for index in (0, 1)
        )
    actual = torch.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25).view(5, 5) / 20_000
    assert_close(actual, first.float()[:, None] * second.float(), atol=0.015, rtol=0)


def test_muon_gets_only_layers_between_hidden_states():
    head, _ = head_of(num_classes=2)
    boundary = {id(weight) for layer in head.boundary_layers() for weight in layer.parameters()}
    linear = {name: layer for name, layer in head.named_modules() if isinstance(layer, torch.nn.Linear)}
    others = {name: layer for name, layer in linear.items() if id(layer.weight) not in boundary}
    assert others and all(
        layer.in_features == 32 and layer.out_features % 32 == 0 for layer in others.values()
    ), list(others)


def test_brier_gradients_match_the_literal_formula():
    head, states = head_of(loss="brier")
    tokens = torch.tensor([[1, 2], [0, 3], [2, 2], [4, 1]])
    states.requires_grad_()
    (actual,) = torch.autograd.grad(head.loss(states, Target(None, tokens)).sum(), states)
    logits = head._vectors(states, tokens) @ head.scores.weight.T + head.scores.bias
    p_PKV = logits.softmax(-1).view(4, 2, 5)
    joint_PVV = p_PKV[:, 0, :, None] * p_PKV[:, 1, None]
    rows = torch.arange(4)
    first = p_PKV[:, 0].square().sum(-1) - 2 * p_PKV[rows, 0, tokens[:, 0]]
    pair = joint_PVV.square().sum((1, 2)) - 2 * joint_PVV[rows, tokens[:, 0], tokens[:, 1]]
    (expected,) = torch.autograd.grad(((first + pair) / 2).sum(), states)
    assert_close(actual, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss", ["cross_entropy", "brier"])
def test_both_losses_learn_the_distribution(loss):
    """Both are strictly proper, and the two tokens are independent."""
    torch.manual_seed(0)
    head = tiny_model(2, vocab_size=4, head_config=PARALLEL | {"loss": loss, "bias_from_text": False}).head
    truth = torch.tensor([[0.6, 0.25, 0.1, 0.05], [0.1, 0.1, 0.4, 0.4]])
    tokens = torch.stack([torch.multinomial(p, 4000, replacement=True) for p in truth], dim=-1)
    states = torch.zeros(4000, 32 + 2 * 5)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(states, Target(None, tokens)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        for index in (0, 1):
            learned = head.token_distribution(head.prepare(states[:1]), tokens[:1], index)[0]
            frequencies = torch.bincount(tokens[:, index], minlength=4) / 4000
            assert_close(learned, frequencies, atol=0.01, rtol=0)


@pytest.mark.parametrize("classes", [1, 7])
def test_brier_loss_does_not_save_the_distributions_of_all_tokens(classes, monkeypatch):
    """Computed in parts, the gradients are the same, and no probabilities are saved for them."""
    head = tiny_model(head_config=PARALLEL | {"num_classes": classes, "loss": "brier"}).head
    states, tokens = torch.randn(500, 32 + 4 * 5), torch.randint(40, (500, 4))
    results, sizes = [], []
    for logits_at_once in (2**26, 10_000):  # Of 2,000 tokens in all; a part has 250 or, with classes, 59.
        monkeypatch.setattr("calm.core.cross_entropy.LOGITS_AT_ONCE", logits_at_once)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        ):
            losses_P = head.loss(states, Target(None, tokens))
        sizes.append(sum({tensor.data_ptr(): tensor.numel() for tensor in saved}.values()))
        saved.clear()
        gradients = torch.autograd.grad(losses_P.square().sum(), list(head.scores.parameters()))
        results.append((losses_P, *gradients))
    assert_close(results[0], results[1])
    assert sizes[1] <= sizes[0] - 2000 * 40


@pytest.mark.parametrize("classes", [1, 7, 100])
def test_flops_of_the_brier_loss_include_all_logits(classes):
    """Against torch's own counter, which does not count the additions of biases."""
    counted, stated = {}, {}
    for loss in ("cross_entropy", "brier"):
        model = tiny_model(head_config=PARALLEL | {"num_classes": classes, "loss": loss})
        states, tokens = torch.randn(6, 32 + 4 * 5, requires_grad=True), torch.randint(40, (6, 4))
        with FlopCounterMode(display=False) as counter:
            model.head.loss(states, Target(None, tokens)).sum().backward()
        counted[loss] = counter.get_total_flops()
        stated[loss] = 6 * model.config.head.flops(32, 8).training_per_draw
    rank = model.config.head.rank
    assert (stated["brier"] - stated["cross_entropy"]) * rank / (rank + 1) == (
        counted["brier"] - counted["cross_entropy"]
    )


def test_only_the_loss_of_a_trained_head_can_change():
    model = tiny_model(head_config=PARALLEL)
    model.change_training(loss="brier")
    assert model.head.config.loss == model.config.head.loss == "brier"
    with pytest.raises(ValueError, match=r"'rank' of a trained parallel head cannot be changed; .*: loss"):
        model.change_training(rank=3)
    with pytest.raises(ValueError, match="loss must be one of"):
        model.change_training(loss="squares")
    assert model.config.head == model.head.config


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss"):
        tiny_model(head_config=PARALLEL | {"loss": "squares"})
