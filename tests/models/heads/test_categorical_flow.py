"""The categorical flow head and the codes that it draws."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config, tiny_model
from torch.testing import assert_close

from calm import CalmAutoencoder, CalmAutoencoderConfig, CalmConfig, CalmForCausalLM
from calm.core.categorical import last_time
from calm.evaluation.reconstruction import evaluate_reconstruction
from calm.flops import autoencoder_training_flops
from calm.models.generation.sampler_registry import default_sampler, sampler_from
from calm.models.heads import Target

HEAD = {"head_type": "categorical_flow"}
ids = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model() -> CalmForCausalLM:
    return tiny_model(head_config=HEAD)


def test_codes_have_equal_norms_and_decode_to_their_tokens():
    autoencoder = CalmAutoencoder(
        CalmAutoencoderConfig(kind="codes", vocab_size=30, chunk_size=3, latent_size=24)
    )
    codes = autoencoder.get_input_embeddings().weight
    assert codes.shape == (30, 8)
    assert_close(codes.norm(dim=-1), torch.full((30,), 8**0.5))
    tokens = torch.randint(30, (50, 3))
    posterior = autoencoder.encode(tokens)
    assert posterior.mean.shape == (50, 24)
    assert torch.equal(autoencoder.decode_tokens(posterior.sample(1)[0]), tokens)
    assert torch.equal(autoencoder.read_tokens(autoencoder.chunk_states(posterior.mean), 1, 3), tokens[:, 1:])
    assert autoencoder_training_flops(autoencoder.config) == 0


def test_codes_are_kept_when_saved_and_loaded(tmp_path):
    model = CalmForCausalLM(tiny_config(head_config=HEAD))
    model.save_pretrained(tmp_path)
    loaded = CalmForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(
        loaded.autoencoder.get_input_embeddings().weight, model.autoencoder.get_input_embeddings().weight
    )
    block = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(4).expand(2, -1)}
    assert evaluate_reconstruction(loaded.autoencoder, [block], torch.Generator()).token_accuracy == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "magic"}, "kind must be one of mlp, codes, got 'magic'"),
        ({"kind": "codes", "latent_size": 30}, "a multiple of the chunk size 4 for codes, got 30"),
    ],
)
def test_bad_settings_of_codes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CalmAutoencoderConfig(**fields)


def test_the_head_takes_sizes_from_the_autoencoder_and_needs_codes():
    config = tiny_config(head_config=HEAD | {"vocab_size": 7, "chunk_size": 9})
    assert (config.head.vocab_size, config.head.chunk_size) == (40, 4)
    with pytest.raises(ValueError, match="set the autoencoder's kind to 'codes', not 'mlp'"):
        CalmConfig(autoencoder_config=CalmAutoencoderConfig(), head_config=HEAD)


def test_the_loss_is_the_cross_entropy_of_prior_and_evidence(model):
    head, hidden, tokens = model.head, torch.randn(5, 32), torch.randint(40, (5, 4))
    codes = model.autoencoder.get_input_embeddings().weight
    posterior = model.autoencoder.encode(tokens)
    noise = head.draw_noise(5, torch.Generator().manual_seed(1))
    time = last_time(2, 40) * noise.time[0]
    points = (1 - time[:, None]) * noise.start[0] + time[:, None] * posterior.mean
    vectors = head.network(points, 1000 * time, head.network.condition_in(hidden)) + head.direct(hidden)
    vectors = vectors.view(5, 4, 6)
    prior = F.linear(vectors, head.scores.weight, head.scores.bias)
    density = -(points.view(5, 4, 1, 2) - time.view(5, 1, 1, 1) * codes).square().sum(-1)
    logits = prior + density / (2 * (1 - time).square()).view(5, 1, 1)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(5, 4).mean(-1)
    assert_close(head.loss(hidden, Target(posterior, tokens), noise), expected)


def test_loss_computed_in_parts_is_the_same(model, monkeypatch):
    losses = []
    for logits_at_once in (2**26, 40 * 7):
        monkeypatch.setattr("calm.core.cross_entropy.LOGITS_AT_ONCE", logits_at_once)
        model.zero_grad()
        loss = model.train()(ids, labels=ids, generator=torch.Generator().manual_seed(2)).loss
        loss.backward()
        losses.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert_close(losses[0], losses[1])


def test_times_are_spread_evenly(model):
    noise = model.head.draw_noise(1000, torch.Generator().manual_seed(3))
    counts = torch.histc(noise.time, 20, 0, 1)
    assert counts.min() >= 48 and counts.max() <= 52
    assert (noise.time[0, 1:] - noise.time[0, :-1]).abs().min() > 0.3


def test_lower_temperatures_draw_likelier_tokens():
    """The default is T = 1; the lower T, the likelier the drawn tokens."""
    autoencoder = CalmAutoencoderConfig(kind="codes", vocab_size=40, chunk_size=4, latent_size=64)
    backbone = tiny_config().backbone.to_dict()
    model = CalmForCausalLM(
        CalmConfig(autoencoder_config=autoencoder, backbone_config=backbone, head_config=HEAD)
    )
    torch.nn.init.normal_(model.head.direct.weight)
    torch.nn.init.normal_(model.head.scores.weight, std=0.1)
    torch.nn.init.zeros_(model.head.network.inp.weight)  # So that draws differ only by the evidence.
    prepared = model.head.prepare(torch.randn(3, 32))
    hot, warm, cold = (
        model.head.draw_latents(prepared, 300, torch.Generator().manual_seed(4), temperature=t)
        for t in (1.0, 0.5, 0.05)
    )
    assert torch.equal(hot, model.head.draw_latents(prepared, 300, torch.Generator().manual_seed(4)))

    head, points = model.head, torch.zeros(1, 3, 64)
    prior = head._features(points, torch.zeros(()), prepared, 1.0) @ head._table().T
    log_distribution = prior.log_softmax(-1)[0]  # Without noise, and at t = 0 without evidence.

    def mean_log_distribution(draws):
        return log_distribution.gather(-1, model.autoencoder.decode_tokens(draws).permute(1, 2, 0)).mean()

    assert mean_log_distribution(cold) > mean_log_distribution(warm) + 0.03 > mean_log_distribution(hot) + 0.1
    with pytest.raises(ValueError, match=r"takes temperatures from 0.01 to 1, got 0"):
        model.head.draw_chunks(prepared, 1, temperature=0)


def test_head_sampler_makes_one_draw_at_the_temperature(model):
    settings = sampler_from(temperature=0.5, sampler="head")
    hidden = torch.randn(3, 32)
    sample = model.sample_chunks(hidden, settings, torch.Generator().manual_seed(0))
    prepared = model.head.prepare(hidden)
    drawn = model.head.draw_chunks(prepared, 1, torch.Generator().manual_seed(0), 0.5)
    assert torch.equal(sample.chunks_RK, drawn[0])
    assert sample.num_draws_R.tolist() == [1, 1, 1]


def test_head_sampler_is_the_default_between_temperatures_0_and_1(model):
    config = model.config.head
    assert default_sampler(config, 0.5) == "head" and default_sampler(config, 0.0) == "exact"
    assert default_sampler(config, 0.5, top_p=0.9) == default_sampler(config, 0.5, min_p=0.1) == "pool"
    written = model.generate(ids, max_new_tokens=8, seed=1, temperature=0.5)
    assert torch.equal(
        written, model.generate(ids, max_new_tokens=8, seed=1, temperature=0.5, sampler="head")
    )


def test_head_that_takes_no_temperature_has_no_head_sampler():
    model = tiny_model()
    assert default_sampler(model.config.head, 0.5) == "exact"
    with pytest.raises(ValueError, match="the energy head does not take a temperature"):
        model.generate(ids, max_new_tokens=8, sampler="head")
    with pytest.raises(ValueError, match="does not take a temperature"):
        model.head.draw_chunks(model.head.prepare(torch.randn(3, 32)), 1, temperature=0.5)


def test_head_sampler_refuses_top_p_and_unsupported_temperatures(model):
    with pytest.raises(ValueError, match="use them with sampler='pool'"):
        sampler_from(sampler="head", temperature=0.5, top_p=0.9)
    for temperature in (-0.1, 1.1):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            sampler_from(sampler="head", temperature=temperature)
    with pytest.raises(ValueError, match=r"categorical_flow head takes temperatures from 0.01 to 1, got 0;"):
        model.generate(ids, max_new_tokens=8, sampler="head", temperature=0.0)
