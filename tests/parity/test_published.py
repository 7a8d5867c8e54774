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
from calm.models.heads.diffusion import DiffusionNoise
from calm.models.heads.energy import EnergyNoise
from calm.models.heads.flow import FlowNoise
from calm.models.published import load_published

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
ENERGY = ["energy_k4", "energy_k2_gqa"]


@pytest.fixture(params=[*ENERGY, "flow_k4", "diffusion_k4"])
def case(request: pytest.FixtureRequest) -> tuple[CalmForCausalLM, dict[str, torch.Tensor]]:
    return load_case(request.param)


def load_case(name: str) -> tuple[CalmForCausalLM, dict[str, torch.Tensor]]:
    folder = FIXTURES / name
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
    chunks = inputs.unflatten(-1, (-1, model.config.chunk_size))
    embeddings = model.projection(model.backbone.embed_tokens(chunks).flatten(-2))
    assert_close(embeddings, expected["calm.chunk_embeds"], **CLOSE)
    assert_close(model.hidden_states_of_chunks(inputs), expected["calm.hidden"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENERGY)
def test_energy_draws(name):
    model, expected = load_case(name)
    noise = expected["calm.train.head_uniform"] - 0.5
    draws = model.head.sample_latents(expected["calm.hidden"].flatten(0, 1), len(noise), noise=noise)
    assert_close(draws, expected["calm.train.latent_draws"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ENERGY)
def test_energy_loss_and_gradients(name):
    model, expected = load_case(name)
    noise = EnergyNoise(expected["calm.train.head_uniform"] - 0.5, expected["calm.train.posterior_eps"])
    check_loss_and_gradient(model, expected, noise)
    assert_close(model.head.out.weight.grad, expected["calm.train.grad.head_last"], rtol=1e-4, atol=1e-5)


def check_loss_and_gradient(model, expected, noise):
    ids = expected["input_ids"]
    loss = model.train()(ids, labels=ids, noise=noise).loss
    assert_close(loss, expected["calm.train.loss"], rtol=1e-5, atol=0)
    loss.backward()
    gradient = model.projection.expand.weight.grad
    assert_close(gradient, expected["calm.train.grad.embed_proj.0.weight"], rtol=1e-4, atol=1e-6)


def test_flow_loss_and_gradient():
    model, expected = load_case("flow_k4")
    shape = (8, expected["calm.train.posterior_eps"].shape[1])
    noise = FlowNoise(
        expected["calm.train.posterior_eps"],
        expected["calm.train.flow_x0"].unflatten(0, shape),
        expected["calm.train.flow_time"].unflatten(0, shape),
    )
    check_loss_and_gradient(model, expected, noise)


def test_flow_draws():
    model, expected = load_case("flow_k4")
    hidden = expected["calm.hidden"].flatten(0, 1)
    draws = model.head.sample_latents(hidden, 1, noise=expected["calm.sample.init_noise"].unsqueeze(0))
    assert_close(draws[0], expected["calm.sample.latent"], rtol=1e-4, atol=1e-5)


def test_diffusion_loss_and_gradient():
    model, expected = load_case("diffusion_k4")
    shape = (8, expected["calm.train.posterior_eps"].shape[1])
    noise = DiffusionNoise(
        expected["calm.train.posterior_eps"],
        expected["calm.train.noise"].unflatten(0, shape),
        expected["calm.train.timesteps"].unflatten(0, shape),
    )
    assert (noise.step == 0).any()  # Step 0, which has its own likelihood, is included.
    check_loss_and_gradient(model, expected, noise)


def test_diffusion_network():
    model, expected = load_case("diffusion_k4")
    condition = model.head.prepare(expected["calm.hidden"].flatten(0, 1)[:5])
    out = model.head.network(expected["net.x"].unsqueeze(0), expected["net.t"], condition)
    assert_close(out[0], expected["net.out"], rtol=1e-5, atol=1e-6)


def test_diffusion_draws():
    model, expected = load_case("diffusion_k4")
    start = expected["calm.sample.init_noise"]
    noise = torch.cat([start.unsqueeze(0), expected["calm.sample.step_noise"]]).unsqueeze(1)
    hidden = expected["calm.hidden"].flatten(0, 1)[: len(start)]
    draws = model.head.sample_latents(hidden, 1, noise=noise)
    # The random network's errors grow to 1e5 in the first steps; they are compared at that scale.
    assert_close(draws[0], expected["calm.sample.latent"], rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("name", ["energy_k4", "flow_k4", "diffusion_k4"])
def test_brier_scores(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    as_chunks = [
        tokens.unflatten(-1, (-1, 4)).flatten(0, 1)
        for tokens in (expected["brier.draw_1"], expected["brier.draw_2"], expected["input_ids"][:, 4:])
    ]
    assert_close(brier_scores(*as_chunks).mean(0), expected["brier.scores"], rtol=1e-6, atol=0)
