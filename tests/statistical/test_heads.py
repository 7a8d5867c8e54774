"""Heads learn a distribution with two modes, of which a head of squared error knows only the middle."""

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
SHARES = torch.tensor([0.7, 0.25])  # Of the mode, in two contexts.
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
    """A head that has seen the two modes."""

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


class GuessingHead(LatentHead):
    """What squared error on the latent itself learns: its mean, with noise of the right width around it."""

    def __init__(self) -> None:
        super().__init__(HeadConfig(head_type="guessing"), SIZE, LATENT)
        self.guess = nn.Sequential(nn.Linear(SIZE, SIZE), nn.SiLU(), nn.Linear(SIZE, LATENT))

    def draw_noise(self, num_positions, generator=None, device="cpu"):
        return (torch.randn(1, num_positions, LATENT, generator=generator),)

    def _loss(self, states_PD, target, noise):
        data_PZ = target.posterior_PZ.sample(1, noise=noise[0])[0]
        return (self.guess(states_PD) - data_PZ).square().sum(-1)

    def prepare(self, states_PD):
        return self.guess(states_PD)

    def draw_latents(self, prepared_P, num_draws, randomness=None, noise=None, temperature=1.0):
        return prepared_P + STD * torch.randn((num_draws, *prepared_P.shape), generator=randomness)


# Fields of each head, ways to draw from it, and the least share of draws that must lie near a mode.
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
    fields, ways, least = HEADS[head_type]
    config = parse_head_config({"head_type": head_type, **fields})
    head = trained(build_head(config, SIZE, LATENT))
    for way in ways:
        head.config = with_sampling(config, way)
        draws = head.sample_latents(CONTEXTS, DRAWS, torch.Generator().manual_seed(2))
        near, share = near_modes(draws)
        assert (near > least).all(), (way, near)
        # The sampling error of a share is 0.007; the rest is what training left.
        assert (share - SHARES).abs().max() < 0.05, (way, share)


def test_squared_error_finds_no_mode():
    near, _ = near_modes(
        trained(GuessingHead()).sample_latents(CONTEXTS, DRAWS, torch.Generator().manual_seed(2))
    )
    assert (near < 0.4).all()


JOINT = torch.tensor(
    [[[0.4, 0.0, 0.1], [0.0, 0.3, 0.0], [0.0, 0.1, 0.1]], [[0.0, 0.2, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.3]]]
)
"""The distribution of two tokens in two contexts, in which each says much of the other."""


def states_of(head, contexts):
    """With nothing in the place of what the head reads itself."""
    return F.pad(contexts, (0, head.config.extra_state_size))


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"head_type": "categorical_flow", "num_steps": 40}, {1.0: 0.08, 0.5: 0.2}),
        ({"head_type": "sequential", "token_size": 8}, {1.0: 0.05, 0.5: 0.15}),
        ({"head_type": "sequential", "token_size": 8, "num_classes": 2}, {1.0: 0.05, 0.5: 0.15}),
        # A class each: within classes, tokens of a chunk are independent, as these are not.
        ({"head_type": "coarse_to_fine", "token_size": 8, "num_classes": 3}, {1.0: 0.05}),
    ],
)
def test_heads_of_codes_learn_a_joint_distribution_and_sharpen_it(fields, most):
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
    for temperature in most:
        draws = head.draw_chunks(prepared, DRAWS, torch.Generator().manual_seed(2), temperature)
        first, second = draws.unbind(-1)
        seen = F.one_hot(3 * first + second, 9).float().mean(0)
        wanted = JOINT.flatten(1) ** (1 / temperature)
        wanted = wanted / wanted.sum(-1, keepdim=True)
        distance = (seen - wanted).abs().sum(-1) / 2
        assert distance.max() < most[temperature], (temperature, distance)
        # Draws at T = 1 are further from the sharpened distribution than those at T = 0.5.
        assert temperature == 1 or ((JOINT.flatten(1) - wanted).abs().sum(-1) / 2 > distance + 0.02).all()
