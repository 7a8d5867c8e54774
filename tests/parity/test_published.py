"""Imported checkpoints compute what the released code computed, down to gradients.

The fixtures are tiny random models in the released format with every random number that was used.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from calm.core.brier import brier_scores
from calm.models.autoencoder import AutoencoderNoise
from calm.models.calm import CalmForCausalLM
from calm.models.heads.energy import EnergyNoise
from calm.models.published import load_published

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=["energy_k4", "energy_k2_gqa"])
def case(request: pytest.FixtureRequest) -> tuple[CalmForCausalLM, dict[str, torch.Tensor]]:
    folder = FIXTURES / request.param
    model = load_published(folder / "autoencoder", folder / "calm")
    return model, load_file(folder / "expected.safetensors")


def test_posterior_and_logits(case):
    model, expected = case
    chunks = expected["input_ids"].unflatten(-1, (-1, model.config.chunk_size))
    posterior = model.autoencoder.encode(chunks)
    assert_close(posterior.mean, expected["ae.mean"], **CLOSE)
    assert_close(posterior.log_std, expected["ae.log_std"], **CLOSE)
    logits = model.autoencoder.decode(expected["ae.mean"])
    assert_close(logits, expected["ae.logits_of_mean"], **CLOSE)


def test_autoencoder_loss_and_gradient(case):
    model, expected = case
    autoencoder = model.autoencoder.requires_grad_(True)
    noise = AutoencoderNoise(
        expected["ae.train.token_uniform"] > autoencoder.config.token_dropout,
        expected["ae.train.posterior_eps"].squeeze(1),
        expected["ae.train.latent_keep"].squeeze(1).bool(),
    )
    loss = autoencoder(expected["input_ids"], labels=expected["input_ids"], noise=noise).loss
    assert_close(loss, expected["ae.train.loss"], **CLOSE)
    loss.backward()
    gradient = autoencoder.encoder.embed_tokens.weight.grad
    assert_close(gradient, expected["ae.train.grad.embed_tokens"], **CLOSE)


def test_backbone(case):
    model, expected = case
    inputs = expected["input_ids"][:, : -model.config.chunk_size]
    embeddings = model.projection(model.backbone.embed_tokens(inputs))
    assert_close(embeddings, expected["calm.chunk_embeds"], **CLOSE)
    assert_close(model.hidden_states_of_chunks(inputs), expected["calm.hidden"], rtol=1e-4, atol=1e-5)


def test_draws(case):
    model, expected = case
    noise = expected["calm.train.head_uniform"] - 0.5
    draws = model.head.sample(expected["calm.hidden"].flatten(0, 1), len(noise), noise=noise)
    assert_close(draws, expected["calm.train.latent_draws"], rtol=1e-4, atol=1e-6)


def test_energy_loss_and_gradients(case):
    model, expected = case
    noise = EnergyNoise(expected["calm.train.head_uniform"] - 0.5, expected["calm.train.posterior_eps"])
    ids = expected["input_ids"]
    loss = model.train()(ids, labels=ids, noise=noise).loss
    assert_close(loss, expected["calm.train.loss"], rtol=1e-5, atol=0)
    loss.backward()
    assert_close(
        model.projection.expand.weight.grad,
        expected["calm.train.grad.embed_proj.0.weight"],
        rtol=1e-4,
        atol=1e-6,
    )
    assert_close(model.head.out.weight.grad, expected["calm.train.grad.head_last"], rtol=1e-4, atol=1e-5)


def test_brier_scores():
    expected = load_file(FIXTURES / "energy_k4" / "expected.safetensors")
    as_chunks = [
        tokens.unflatten(-1, (-1, 4)).flatten(0, 1)
        for tokens in (expected["brier.draw_1"], expected["brier.draw_2"], expected["input_ids"][:, 4:])
    ]
    assert_close(brier_scores(*as_chunks).mean(0), expected["brier.scores"], rtol=1e-6, atol=0)
