"""The decoder head against the enumeration of all chunks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_model
from torch.testing import assert_close

from calm import CalmForCausalLM
from calm.models.heads import Likelihood, Target, TokenDistributions

HEAD = {"head_type": "decoder", "last_layers": 2}
VOCABULARY = {2: 5, 4: 3}
ids = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(5))


def model_of(size: int, **changes) -> CalmForCausalLM:
    """A model with few chunks that are not equally likely, in double precision."""
    torch.manual_seed(0)
    changes = {"head_config": HEAD, **changes}
    model = tiny_model(size, **{"vocab_size": VOCABULARY[size], **changes}).double()
    with torch.no_grad():
        for weight in [*model.head.parameters(), *model.projection.parameters()]:
            if weight.ndim > 1:
                weight.normal_(std=0.2)
        model.head.norm.weight.fill_(0.2)  # So that no chunk is too rare to be drawn.
    return model


def chunks_of(size: int) -> torch.Tensor:
    """All possible chunks, (V^K, K), in lexicographic order."""
    return torch.tensor(list(itertools.product(range(VOCABULARY[size]), repeat=size)))


def log_distributions(model, states):
    """Log-probability of every chunk in every state, (P, V^K), from the loss."""
    chunks = chunks_of(model.config.chunk_size)
    size = model.config.chunk_size
    with torch.no_grad():
        losses = [model.head.loss(state.expand(len(chunks), -1), Target(None, chunks)) for state in states]
    return -size * torch.stack(losses).double()


def states_of(model, number: int = 3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(number, model.config.state_size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("size", VOCABULARY)
def test_probabilities_from_the_loss_sum_to_one(size):
    model = model_of(size)
    assert isinstance(model.head, Likelihood) and isinstance(model.head, TokenDistributions)
    probabilities = log_distributions(model, states_of(model)).exp()
    assert_close(probabilities.sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)
    assert probabilities.std() > 0.2 / probabilities.shape[-1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("size", VOCABULARY)
def test_draws_follow_the_distribution_of_the_loss(size, temperature):
    """At T each token has its distribution to the power 1/T, normalized, given the tokens before it."""
    model, number = model_of(size), 20_000
    vocabulary, states = VOCABULARY[size], states_of(model)
    log_joint = log_distributions(model, states).unflatten(-1, (vocabulary,) * size)
    expected = torch.zeros_like(log_joint)
    for index in range(size):
        marginal = log_joint.flatten(index + 2).logsumexp(-1) if index < size - 1 else log_joint
        log_p = (marginal / temperature).log_softmax(index + 1)
        expected = expected + log_p.reshape(*log_p.shape, *(1,) * (size - 1 - index))
    expected = expected.exp().flatten(1)
    drawn = model.head.draw_chunks(
        model.head.prepare(states), number, torch.Generator().manual_seed(1), temperature
    )
    powers = vocabulary ** torch.arange(size - 1, -1, -1)
    actual = F.one_hot((drawn * powers).sum(-1), vocabulary**size).double().mean(0)
    # One of 243 frequencies is this many standard errors off for about one seed in 600.
    assert ((actual - expected).abs() < 4.5 * (expected * (1 - expected) / number).sqrt() + 1e-5).all()


@pytest.mark.parametrize("size", VOCABULARY)
def test_token_probabilities_distributions_and_losses_agree(size):
    model = model_of(size)
    states, tokens = states_of(model, 4), chunks_of(size)[[1, 4, 7, 8]]
    statistics = model.head.token_probabilities(states, tokens, 0.5)
    for index in range(size):
        p_PV = model.head.token_distribution(model.head.prepare(states), tokens, index, 0.5)
        assert_close(p_PV.sum(-1), torch.ones(4))
        assert_close(statistics.of_token_PK[:, index], p_PV.gather(1, tokens[:, index, None]).squeeze(-1))
        assert_close(statistics.of_pair_PK[:, index], p_PV.square().sum(-1))
        assert_close(statistics.highest_PK[:, index], p_PV.amax(-1))
        other = tokens.clone()
        other[:, index:] = (other[:, index:] + 1) % VOCABULARY[size]
        assert_close(p_PV, model.head.token_distribution(model.head.prepare(states), other, index, 0.5))
    at_one = model.head.token_probabilities(states, tokens).of_token_PK
    assert_close(-at_one.log(), model.head.token_losses(states, tokens))


@pytest.mark.parametrize("size", VOCABULARY)
def test_greedy_draws_are_the_likeliest_tokens(size):
    model = model_of(size, vocab_size=40)
    states = states_of(model, 6)
    drawn = model.head.draw_chunks(model.head.prepare(states), 2, temperature=0.0)
    assert torch.equal(drawn[0], drawn[1])
    for index in range(size):
        likeliest = model.head.token_distribution(model.head.prepare(states), drawn[0], index).argmax(-1)
        assert torch.equal(drawn[0, :, index], likeliest)


def test_update_of_the_backbone_affects_every_token():
    model = model_of(4, vocab_size=40)
    states, tokens = states_of(model), ids[:1, :4].expand(3, -1)
    changed = states + F.pad(torch.ones(3, 32), (0, 32))
    losses = [model.head.token_losses(states_PD, tokens) for states_PD in (states, changed)]
    assert (losses[0] - losses[1]).abs().amin() > 1e-6


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (2, 0)])
def test_first_and_last_layers_are_optional(first, last):
    model = model_of(2, vocab_size=40, head_config={**HEAD, "first_layers": first, "last_layers": last})
    drawn = model.head.draw_chunks(model.head.prepare(states_of(model)), 1, temperature=0.0)[0]
    second = model.head.token_distribution(model.head.prepare(states_of(model)), drawn, 1)
    assert torch.equal(second.argmax(-1), drawn[:, 1])


@pytest.mark.parametrize("reads", ["tokens", "latents", "both"])
def test_the_shared_embeddings_are_trained_whatever_the_backbone_reads(reads):
    model = tiny_model(2, head_config=HEAD, backbone_input=reads, input_projection="mlp").train()
    model(ids, labels=ids).loss.backward()
    assert model.backbone.embed_tokens.weight.grad.abs().sum() > 0


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="last_layers must be from 0"):
        tiny_config(head_config={**HEAD, "last_layers": -1})
    with pytest.raises(ValueError, match="input_projection 'last' requires backbone_input 'tokens'"):
        tiny_config(head_config=HEAD, backbone_input="both")
    with pytest.raises(ValueError, match="input_projection must be one of mlp, last"):
        tiny_config(head_config=HEAD, input_projection="one")
    with pytest.raises(ValueError, match="final_norm must be true or false"):
        tiny_config(head_config=HEAD, final_norm="no")


@pytest.mark.parametrize("is_tied", [True, False])
def test_saved_and_loaded_model_has_the_same_loss(is_tied, tmp_path):
    model = model_of(4, vocab_size=40)
    if not is_tied:
        model = CalmForCausalLM(tiny_config(head_config={**HEAD, "has_tied_scores": False})).double().eval()
    model.save_pretrained(tmp_path)
    loaded = CalmForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(model(ids, labels=ids).loss, loaded(ids, labels=ids).loss)
    assert loaded.config.final_norm is False and loaded.config.input_projection == "last"
    has_scores = any(name.startswith("head.scores") for name, _ in loaded.named_parameters())
    assert has_scores is not is_tied
