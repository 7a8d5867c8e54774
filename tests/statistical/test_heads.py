"""Heads learn a distribution with two modes; squared error finds only the mean between them."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm import CalmAutoencoder, CalmAutoencoderConfig
from calm.core.gaussian import DiagonalGaussian
from calm.models.blocks import ZeroLinear
from calm.models.heads import HeadConfig, LatentHead, Target, build_head, parse_head_config, with_sampling

SIZE, LATENT, STD = 32, 4, 0.2
MODE = torch.tensor([1.5, -1.0, 1.0, 0.5])  # The other mode is its mirror image.
SHARES = torch.tensor([0.7, 0.25])  # Probability of `MODE` in each of two contexts.
CONTEXTS = torch.eye(2, SIZE)
STEPS, BATCH, DRAWS = 1000, 64, 4000


def train(head: LatentHead, loss: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    """Train a head on random contexts."""
    for module in head.modules():
        if isinstance(module, ZeroLinear):
            nn.init.zeros_(module.weight)
    optimizer = torch.optim.Adam(head.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        context = torch.randint(2, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(context, generator).mean().backward()
        optimizer.step()
        decay.step()
    head.requires_grad_(False)


def trained(head: LatentHead) -> LatentHead:
    """A head trained on the two modes."""

    def loss(context: Tensor, generator: torch.Generator) -> Tensor:
        sign = torch.where(torch.rand(BATCH, generator=generator) < SHARES[context], 1.0, -1.0)
        posterior = DiagonalGaussian(sign.unsqueeze(-1) * MODE, torch.full((BATCH, LATENT), math.log(STD)))
        return head.loss(CONTEXTS[context], Target(posterior, torch.zeros(BATCH, 1)), generator=generator)

    train(head, loss)
    return head


def near_modes(draws_NPZ: Tensor) -> tuple[Tensor, Tensor]:
    """For each context: the share of draws near any mode, and of these the share near the first."""
    first, second = ((draws_NPZ - sign * MODE).norm(dim=-1) < 5 * STD for sign in (1, -1))
    return (first | second).float().mean(0), first.sum(0) / (first | second).sum(0)


class RegressionHead(LatentHead):
    """Learns the mean of the latent by squared error; draws have noise of the right width around it."""

    def __init__(self) -> None:
        super().__init__(HeadConfig(head_type="regression"), SIZE, LATENT)
        self.mean = nn.Sequential(nn.Linear(SIZE, SIZE), nn.SiLU(), nn.Linear(SIZE, LATENT))

    def draw_noise(self, num_positions, generator=None, device="cpu"):
        return (torch.randn(1, num_positions, LATENT, generator=generator),)

    def _loss(self, states_PD, target, noise):
        data_PZ = target.posterior_PZ.sample(1, noise=noise[0])[0]
        return (self.mean(states_PD) - data_PZ).square().sum(-1)

    def prepare(self, states_PD):
        return self.mean(states_PD)

    def draw_latents(self, prepared_P, num_draws, randomness=None, noise=None, temperature=1.0):
        return prepared_P + STD * torch.randn((num_draws, *prepared_P.shape), generator=randomness)


# Fields of each head, settings to sample with, and the minimum share of draws near a mode.
HEADS = {
    "energy": ({"noise_size": 8, "num_posterior_draws": 0}, [{}], 0.9),
    "flow": ({}, [{"num_steps": 10}, {"solver": "heun", "num_steps": 10}], 0.98),
    "diffusion": (
        {},
        [{"num_steps": 100}, {"num_steps": 25, "sampler": "ddim"}, {"num_steps": 15, "sampler": "dpm"}],
        0.98,
    ),
}


@pytest.mark.parametrize("head_type", HEADS)
def test_two_modes_are_recovered(head_type):
    fields, samplings, min_share = HEADS[head_type]
    config = parse_head_config({"head_type": head_type, **fields})
    head = trained(build_head(config, SIZE, LATENT))
    for sampling in samplings:
        head.config = with_sampling(config, sampling)
        draws = head.sample_latents(CONTEXTS, DRAWS, torch.Generator().manual_seed(2))
        near, share = near_modes(draws)
        assert (near > min_share).all(), (sampling, near)
        # The sampling error of a share is 0.007; the rest is what training left.
        assert (share - SHARES).abs().max() < 0.05, (sampling, share)


def test_squared_error_finds_no_mode():
    near, _ = near_modes(
        trained(RegressionHead()).sample_latents(CONTEXTS, DRAWS, torch.Generator().manual_seed(2))
    )
    assert (near < 0.4).all()


JOINT = torch.tensor(
    [[[0.4, 0.0, 0.1], [0.0, 0.3, 0.0], [0.0, 0.1, 0.1]], [[0.0, 0.2, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.3]]]
)
"""The distribution of two tokens in two contexts; the tokens strongly depend on each other."""


def states_of(head, contexts):
    """Contexts, padded with zeros for the extra state that some heads read."""
    return F.pad(contexts, (0, head.config.extra_state_size))


@pytest.mark.parametrize(
    ("fields", "max_distance"),
    [
        ({"head_type": "categorical_flow", "num_steps": 40}, {1.0: 0.08, 0.5: 0.2}),
        ({"head_type": "sequential", "token_size": 8}, {1.0: 0.05, 0.5: 0.15}),
        ({"head_type": "sequential", "token_size": 8, "num_classes": 2}, {1.0: 0.05, 0.5: 0.15}),
        # One class per token: given their classes, tokens of a chunk are independent, which these are not.
        ({"head_type": "coarse_to_fine", "token_size": 8, "num_classes": 3}, {1.0: 0.05}),
    ],
)
def test_heads_of_codes_learn_a_joint_distribution_and_sharpen_it(fields, max_distance):
    autoencoder = CalmAutoencoder(
        CalmAutoencoderConfig(kind="codes", vocab_size=3, chunk_size=2, latent_size=12)
    )
    sizes = {"vocab_size": 3, "chunk_size": 2, "rank": 8}
    head = build_head(parse_head_config(fields | sizes), SIZE, 12)
    head.attach(autoencoder.requires_grad_(False))

    def loss(context, generator):
        chunk = torch.multinomial(JOINT[context].flatten(1), 1, generator=generator)[:, 0]
        tokens = torch.stack([chunk // 3, chunk % 3], dim=-1)
        states = states_of(head, CONTEXTS[context])
        return head.loss(states, Target(autoencoder.encode(tokens), tokens), generator=generator)

    train(head, loss)
    prepared = head.prepare(states_of(head, CONTEXTS))
    for temperature in max_distance:
        draws = head.draw_chunks(prepared, DRAWS, torch.Generator().manual_seed(2), temperature)
        first, second = draws.unbind(-1)
        actual = F.one_hot(3 * first + second, 9).float().mean(0)
        expected = JOINT.flatten(1) ** (1 / temperature)
        expected = expected / expected.sum(-1, keepdim=True)
        distance = (actual - expected).abs().sum(-1) / 2
        assert distance.max() < max_distance[temperature], (temperature, distance)
        # Draws at T = 1 are further from the sharpened distribution than those at T = 0.5.
        assert temperature == 1 or ((JOINT.flatten(1) - expected).abs().sum(-1) / 2 > distance + 0.02).all()
