"""The coarse-to-fine head against the enumeration of all chunks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_model
from torch.testing import assert_close

from calm.core.gaussian import DiagonalGaussian
from calm.models.heads import Likelihood, Target
from calm.models.heads.registry import build_head, parse_head_config

HEAD = {"head_type": "coarse_to_fine", "num_classes": 2}
VOCABULARY, SIZE = 5, 3


@pytest.fixture
def head():
    """A head with few chunks, that are not equally likely; the classes are {3, 1, 4} and {0, 2}."""
    fields = HEAD | {"token_size": 5, "rank": 6, "chunk_size": SIZE, "vocab_size": VOCABULARY}
    head = build_head(parse_head_config(fields), 32, 8)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.2)
        head.tokens_by_class.copy_(torch.tensor([3, 1, 4, 0, 2]))
    return head


def target(chunks):
    return Target(DiagonalGaussian(torch.zeros(len(chunks), 8), torch.zeros(len(chunks), 8)), chunks)


def distributions(head, states):
    """Probability of every chunk in every state, (P, V^K), from the loss."""
    chunks = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=SIZE)))
    return torch.stack(
        [(-SIZE * head.loss(state.expand(len(chunks), -1), target(chunks))).exp() for state in states]
    ).detach()


def states_of(head, number=3):
    return torch.randn(number, 32 + head.config.extra_state_size, generator=torch.Generator().manual_seed(3))


def test_loss_gives_a_distribution_with_dependent_tokens(head):
    probabilities = distributions(head, states_of(head))
    assert_close(probabilities.sum(1), torch.ones(3))
    assert probabilities.std() > 0.005
    tokens = probabilities.view(3, *[VOCABULARY] * SIZE)
    independent = tokens.sum((2, 3))[:, :, None, None] * tokens.sum((1, 3))[:, None, :, None]
    independent = independent * tokens.sum((1, 2))[:, None, None]
    assert (tokens - independent).abs().amax() > 0.003  # Tokens of a chunk depend on each other.


def test_draws_follow_the_distribution_of_the_loss(head):
    states, number = states_of(head), 60_000
    expected = distributions(head, states).double()
    draws = head.draw_chunks(head.prepare(states), number, torch.Generator().manual_seed(1))
    indices = (draws * VOCABULARY ** torch.arange(SIZE - 1, -1, -1)).sum(-1)
    actual = F.one_hot(indices, VOCABULARY**SIZE).double().mean(0)
    # One of 375 frequencies is this many standard errors off for about one seed in 1,000.
    assert ((actual - expected).abs() < 4.7 * (expected * (1 - expected) / number).sqrt() + 1e-9).all()


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_training_and_generation_at_other_chunk_sizes(chunk_size):
    model = tiny_model(chunk_size, head_config={"head_type": "coarse_to_fine"})
    ids = torch.randint(3, 40, (2, 16))
    model(ids, labels=ids).loss.backward()
    assert model.generate(ids, max_new_tokens=8, eos_token_id=[], seed=1).shape == (2, 24)


def test_first_class_has_the_distribution_of_its_own_logits(head):
    """Classes are drawn in order: the first one does not depend on anything after it."""
    tokens = distributions(head, states_of(head)).view(3, *[VOCABULARY] * SIZE)
    is_first = torch.tensor([0, 1, 0, 1, 1]).bool()  # Tokens of the first class.
    by_class = torch.stack([tokens[:, is_first].sum((1, 2, 3)), tokens[:, ~is_first].sum((1, 2, 3))], dim=1)
    vectors = head.prepare(states_of(head))[:, : head.config.class_rank]
    expected = F.linear(F.silu(vectors), head.class_scores.weight, head.class_scores.bias).softmax(-1)
    assert_close(by_class, expected.detach(), rtol=1e-4, atol=1e-5)


def test_new_head_starts_from_token_frequencies():
    torch.manual_seed(0)
    head = build_head(tiny_config(head_config=HEAD | {"num_classes": 4}).head, 32, 8)
    counts = torch.arange(40)
    head.init_from_neighbours(lambda: torch.rand(40, 8))
    head.init_from_counts(lambda: counts)
    with torch.no_grad():
        for network in (head.coarse, head.fine):
            for layer in (network.out, network.direct):
                layer.weight.zero_(), layer.bias.zero_()
        head.embed_earlier.weight.zero_()
        chunks = torch.arange(40).unsqueeze(1).expand(-1, 4)
        states = torch.randn(1, 32 + head.config.extra_state_size).expand(40, -1)
        losses = head.loss(states, target(chunks))
    assert_close(losses, -((counts + 0.5) / (counts + 0.5).sum()).log())


def test_it_has_no_likelihood_of_single_tokens():
    assert not isinstance(tiny_model(head_config=HEAD).head, Likelihood)


def test_bad_fields_are_named():
    for field in ("num_fine_blocks", "class_rank", "class_embedding_size"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
            tiny_config(head_config=HEAD | {field: 0})
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        tiny_config(head_config=HEAD | {"num_classes": 1})
    with pytest.raises(ValueError, match="layer_norm_eps must be above 0"):
        tiny_config(head_config=HEAD | {"layer_norm_eps": 0.0})
