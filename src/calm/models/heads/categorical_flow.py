"""The categorical flow head: flow matching to token codes, trained by cross-entropy (docs/heads.md).

Instead of a velocity it predicts the distribution of each token at the end of the path, from which the
velocity follows. The evidence that a point itself gives about its token is known in closed form and added
(see `calm.core.categorical`), so the network only has to learn the distribution of a token given the hidden
state and the noisy codes of the other tokens.

Shapes: N draws, P positions, K tokens per chunk, D hidden size, Z latent size, V vocabulary, r rank, d = Z/K
size of a token's code, X = r + 1 + d size of the vectors that give the logits.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from calm.core.categorical import evidence, follow_endpoints, last_time, times_of_steps
from calm.core.cross_entropy import cross_entropy
from calm.core.random import Randomness
from calm.models.blocks import SlicedLinear, ZeroLinear
from calm.models.heads.contract import Target
from calm.models.heads.fields import HeadFlops
from calm.models.heads.logits import token_distributions
from calm.models.heads.step_network import UNITS_OF_TIME, StepHead, StepHeadConfig
from calm.models.heads.token_head import TokenHead, TokenHeadConfig

_GOLDEN_RATIO = 0.6180339887498949


@dataclass(kw_only=True)
class CategoricalFlowHeadConfig(TokenHeadConfig, StepHeadConfig):
    """Fields of the categorical flow head.

    Args:
        head_type: Always "categorical_flow".
        num_blocks: Residual blocks.
        num_draws: Points N per position in the loss, each with its own time and noise.
        num_steps: Network calls per draw, at least 2.
        frequency_size: Number of sines and cosines in the time embedding.
        layer_norm_eps: Epsilon of the norms.

    For the other fields, see `TokenHeadConfig`.
    """

    head_type: str = "categorical_flow"
    num_draws: int = 1
    num_steps: int = 4

    sampling_fields: ClassVar[tuple[str, ...]] = ("num_steps",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 2:  # A single step would end at the mean of the codes.
            raise ValueError(f"num_steps must be at least 2, got {self.num_steps}.")

    def output_size(self, latent_size: int) -> int:
        """See `StepHeadConfig`: a vector per token."""
        return self.chunk_size * self.rank

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """See `HeadConfig`; includes the vocabulary logits, and the mean codes computed from them."""
        network = super().flops(hidden_size, latent_size)
        code_size = latent_size // self.chunk_size
        direct = 2 * hidden_size * self.output_size(latent_size)
        logits = 2 * self.chunk_size * self.vocab_size * (self.rank + 1 + code_size)
        mean_codes = 2 * self.chunk_size * self.vocab_size * code_size
        return network._replace(
            shared=network.shared + direct,
            training_shared=network.training_shared + 3 * direct,
            per_draw=network.per_draw + self.calls * (logits + mean_codes),
            training_per_draw=network.training_per_draw + 3 * logits,
        )


class CategoricalFlowNoise(NamedTuple):
    """All randomness of one loss: starting points (N, P, Z), times as fractions of `last_time` (N, P)."""

    start: Tensor
    time: Tensor


class CategoricalFlowHead(TokenHead, StepHead):
    """Sampler that follows the expected codes of the tokens, given the current point."""

    config: CategoricalFlowHeadConfig

    def __init__(self, config: CategoricalFlowHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        # A direct path: otherwise the hidden state only scales and shifts the network's norms.
        self.direct = ZeroLinear(hidden_size, config.output_size(latent_size))
        self.scores = SlicedLinear(config.rank, config.vocab_size)
        self.code_size = latent_size // config.chunk_size

    def prepare(self, states_PD: Tensor) -> Tensor:
        """The network's condition, and the state's direct contribution to token vectors, (P, D + K·r)."""
        return torch.cat([super().prepare(states_PD), self.direct(states_PD)], dim=-1)

    def _loss(self, states_PD: Tensor, target: Target, noise: CategoricalFlowNoise) -> Tensor:
        """Mean cross-entropy of the chunk's tokens at N points per position, in nats, shape (P,)."""
        codes_PZ = target.posterior_PZ.mean
        time_NP = last_time(self.code_size, self.config.vocab_size) * noise.time
        points_NPZ = torch.lerp(noise.start, codes_PZ.to(noise.start.dtype), time_NP.unsqueeze(-1))
        features_NPKX = self._features(points_NPZ, time_NP, self.prepare(states_PD), 1.0)
        targets_NPK = target.tokens_PK.expand(*features_NPKX.shape[:-1])
        loss_M = cross_entropy(features_NPKX.flatten(0, 2), self._table(), targets_NPK.flatten())
        return loss_M.view_as(targets_NPK).mean((0, 2))

    def draw_noise(
        self, num_positions: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> CategoricalFlowNoise:
        """See `GenerativeHead`. Times are evenly spread from a random offset, which lowers the variance."""
        shape = (self.config.num_draws, num_positions)
        start_NPZ = torch.randn((*shape, self.latent_size), generator=generator, device=device)
        offset = torch.rand((), generator=generator, device=device).cpu().double()
        index_NP = torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape)
        time_NP = (offset + _GOLDEN_RATIO * index_NP) % 1  # On the CPU: some devices lack float64.
        return CategoricalFlowNoise(start_NPZ, time_NP.float().to(device))

    def draw_latents(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """See `LatentHead`; recorded noise is standard normal, of shape (N, P, Z).

        Below T = 1, each token's distribution given the current state of its neighbors is sharpened. As in a
        token-level model, this is not the distribution of whole chunks to the power 1/T.
        """
        table_VX, codes_VC = self._table(), self._codes()

        def endpoint(points_NPZ: Tensor, time: float) -> Tensor:
            time_tensor = torch.full((), time, device=points_NPZ.device)
            features_NPKX = self._features(points_NPZ, time_tensor, prepared_P, temperature)
            distributions = token_distributions(features_NPKX.flatten(0, 2), table_VX)
            means = [p_MV.to(codes_VC.dtype) @ codes_VC for p_MV in distributions]
            return torch.cat(means).view_as(points_NPZ).to(points_NPZ.dtype)

        start_NPZ = self.noise_of_points(prepared_P, num_draws, randomness, noise)
        times = times_of_steps(self.config.num_steps, self.code_size, self.config.vocab_size)
        return follow_endpoints(endpoint, start_NPZ, times)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that touch codes, times or the vocabulary."""
        return [*super().boundary_layers(), self.direct, self.scores]

    def _features(self, points_NPZ: Tensor, time: Tensor, prepared_P: Tensor, temperature: float) -> Tensor:
        """Vectors whose products with the rows of `_table` are the logits, (N, P, K, r + 1 + d)."""
        size = self.config.chunk_size
        split = prepared_P.shape[-1] - self.direct.out_features
        condition_PD, direct_P = prepared_P[:, :split], prepared_P[:, split:]
        vectors_NP = self.network(points_NPZ, UNITS_OF_TIME * time, condition_PD) + direct_P
        vectors_NPKR = vectors_NP.unflatten(-1, (size, -1))
        evidence_NPKC = evidence(points_NPZ.unflatten(-1, (size, -1)), time)
        ones_NPK1 = torch.ones_like(vectors_NPKR[..., :1])  # They multiply the bias.
        learned = torch.cat([vectors_NPKR, ones_NPK1], dim=-1) / temperature  # Not the evidence.
        return torch.cat([learned, evidence_NPKC], dim=-1).to(self.scores.weight.dtype)

    def _table(self) -> Tensor:
        """One row per token: its learned vector and bias, and its code, (V, r + 1 + d)."""
        weight_VR, bias_V = self.scores.weight, self.scores.bias
        return torch.cat([weight_VR, bias_V.unsqueeze(-1), self._codes()], dim=-1)

    def _codes(self) -> Tensor:
        """The codes, (V, d), with the head's dtype and device, which may differ from the autoencoder's."""
        (autoencoder,) = self._autoencoder
        return autoencoder.get_input_embeddings().weight.to(self.scores.weight)  # type: ignore[operator]
