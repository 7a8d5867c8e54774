"""The categorical flow head: flow matching to codes of tokens, trained by cross-entropy (docs/heads.md).

It predicts no velocity but the law of each token at the end of the path; the velocity follows from it. What
the point itself says of its token is known in closed form and added (see `calm.core.categorical`), so that
the network learns the law of a token given the hidden state and the noisy tokens beside it, and nothing
else.

Shapes: N draws, P positions, K tokens per chunk, D hidden size, Z latent size, V vocabulary, r rank.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from calm.core.categorical import evidence, follow_endpoints, last_time, times_of_steps
from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness
from calm.models.blocks import PartedLinear, ZeroLinear
from calm.models.heads.adaln import UNITS_OF_TIME, AdaptiveHead, AdaptiveHeadConfig
from calm.models.heads.base import CodeHead, CodeHeadConfig, HeadWork
from calm.models.heads.scores import cross_entropy, laws

_GOLDEN_RATIO = 0.6180339887498949


@dataclass(kw_only=True)
class CategoricalFlowHeadConfig(CodeHeadConfig, AdaptiveHeadConfig):
    """Fields of the categorical flow head.

    Args:
        head_type: Always "categorical_flow".
        num_blocks: Residual blocks.
        num_draws: Points N of a position in the loss, each with a time and noise of its own.
        num_steps: Network calls of a draw, at least 2.
        frequency_size: Sines and cosines of a time.
        layer_norm_eps: Epsilon of the norms.

    The others are those of `CodeHeadConfig`.
    """

    head_type: str = "categorical_flow"
    num_draws: int = 1
    num_steps: int = 4

    sampling_fields: ClassVar[tuple[str, ...]] = ("num_steps",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 2:  # A single one ends at the mean of all codes.
            raise ValueError(f"num_steps must be at least 2, got {self.num_steps}.")

    def output_size(self, latent_size: int) -> int:
        """See `AdaptiveHeadConfig`: a vector for each token."""
        return self.chunk_size * self.rank

    def work(self, hidden_size: int, latent_size: int) -> HeadWork:
        """See `HeadConfig`; with the scores of the vocabulary, and the mean code that they give."""
        work = super().work(hidden_size, latent_size)
        code = latent_size // self.chunk_size
        direct = hidden_size * self.output_size(latent_size)
        scores = self.chunk_size * self.vocab_size * (self.rank + 1 + code)
        mean = self.chunk_size * self.vocab_size * code
        return work._replace(
            shared=work.shared + direct,
            training_shared=work.training_shared + 3 * direct,
            per_draw=work.per_draw + self.calls * (scores + mean),
            training_per_draw=work.training_per_draw + 3 * scores,
        )


class CategoricalFlowNoise(NamedTuple):
    """All randomness of one loss: starting points (N, P, Z), times as shares of the last one (N, P)."""

    start: Tensor
    time: Tensor


class CategoricalFlowHead(CodeHead, AdaptiveHead):
    """Sampler that follows the mean code of the tokens a point may lead to."""

    config: CategoricalFlowHeadConfig

    def __init__(self, config: CategoricalFlowHeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__(config, hidden_size, latent_size)
        # Straight from the hidden state: the network meets it only as a scale and shift of its norms.
        self.direct = ZeroLinear(hidden_size, config.output_size(latent_size))
        self.scores = PartedLinear(config.rank, config.vocab_size)
        self.code_size = latent_size // config.chunk_size

    def prepare(self, hidden_PD: Tensor) -> Tensor:
        """The hidden state as the network takes it, and its direct part of tokens' vectors, (P, D + K·r)."""
        return torch.cat([super().prepare(hidden_PD), self.direct(hidden_PD)], dim=-1)

    def loss(
        self,
        hidden_PD: Tensor,
        posterior_PZ: DiagonalGaussian,
        generator: torch.Generator | None = None,
        noise: CategoricalFlowNoise | None = None,
        tokens_PK: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the chunk's tokens at N points of every position, in nats, shape (P,)."""
        if tokens_PK is None:
            raise ValueError("the loss of a categorical_flow head takes the tokens of the chunks, tokens_PK.")
        codes_PZ = posterior_PZ.mean
        if noise is None:
            noise = self.draw_noise(len(hidden_PD), codes_PZ.shape[-1], generator, hidden_PD.device)
        time_NP = last_time(self.code_size, self.config.vocab_size) * noise.time
        points_NPZ = torch.lerp(noise.start, codes_PZ.to(noise.start.dtype), time_NP.unsqueeze(-1))
        features_NPKX = self._features(points_NPZ, time_NP, self.prepare(hidden_PD), 1.0)
        targets_NPK = tokens_PK.expand(*features_NPKX.shape[:-1])
        loss_M = cross_entropy(features_NPKX.flatten(0, 2), self._table(), targets_NPK.flatten())
        return loss_M.view_as(targets_NPK).mean((0, 2))

    def draw_noise(
        self,
        num_positions: int,
        latent_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> CategoricalFlowNoise:
        """See `GenerativeHead`. Times are spread evenly from a random beginning, which lowers variance."""
        shape = (self.config.num_draws, num_positions)
        start_NPZ = torch.randn((*shape, latent_size), generator=generator, device=device)
        beginning = torch.rand((), generator=generator, device=device).cpu().double()
        number_NP = torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape)
        time_NP = (beginning + _GOLDEN_RATIO * number_NP) % 1  # In double: some devices have none.
        return CategoricalFlowNoise(start_NPZ, time_NP.float().to(device))

    def draw(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """See `GenerativeHead`; recorded noise is standard normal, of shape (N, P, Z)."""
        return self._draw(prepared_P, self.noise_of_points(prepared_P, num_draws, randomness, noise), 1.0)

    def draw_at(
        self, temperature: float, prepared_P: Tensor, num_draws: int, randomness: Randomness = None
    ) -> Tensor:
        """See `GenerativeHead`: each token's law, given what its neighbours have become so far, is sharpened.

        As with a model of tokens this is not the law of whole chunks to the power 1/T; it costs one draw.
        """
        self.check_temperature(temperature)
        start_NPZ = self.noise_of_points(prepared_P, num_draws, randomness, None)
        return self._draw(prepared_P, start_NPZ, temperature)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that meet codes, times or the vocabulary."""
        return [*super().boundary_layers(), self.direct, self.scores]

    def _draw(self, prepared_P: Tensor, start_NPZ: Tensor, temperature: float) -> Tensor:
        table_VX, codes_VC = self._table(), self._code_table()

        def endpoint(points_NPZ: Tensor, time: float) -> Tensor:
            now = torch.full((), time, device=points_NPZ.device)
            features_NPKX = self._features(points_NPZ, now, prepared_P, temperature)
            means = [
                law_MV.to(codes_VC.dtype) @ codes_VC for law_MV in laws(features_NPKX.flatten(0, 2), table_VX)
            ]
            return torch.cat(means).view_as(points_NPZ).to(points_NPZ.dtype)

        times = times_of_steps(self.config.num_steps, self.code_size, self.config.vocab_size)
        return follow_endpoints(endpoint, start_NPZ, times)

    def _features(self, points_NPZ: Tensor, time: Tensor, prepared_P: Tensor, temperature: float) -> Tensor:
        """What the rows of `_table` are multiplied with to give scores of tokens, (N, P, K, r + d + 1)."""
        size = self.config.chunk_size
        split = prepared_P.shape[-1] - self.direct.out_features
        condition_PD, direct_PX = prepared_P[:, :split], prepared_P[:, split:]
        vectors_NPX = self.network(points_NPZ, (UNITS_OF_TIME * time,), condition_PD) + direct_PX
        vectors_NPKR = vectors_NPX.unflatten(-1, (size, -1))
        evidence_NPKC = evidence(points_NPZ.unflatten(-1, (size, -1)), time)
        one_NPK1 = torch.ones_like(vectors_NPKR[..., :1])
        learned = torch.cat([vectors_NPKR, one_NPK1], dim=-1) / temperature  # Evidence has no temperature.
        return torch.cat([learned, evidence_NPKC], dim=-1).to(self.scores.weight.dtype)

    def _table(self) -> Tensor:
        """A row for each token: its learned vector and bias, and its code, (V, r + 1 + d)."""
        weight_VR, bias_V = self.scores.weight, self.scores.bias
        return torch.cat([weight_VR, bias_V.unsqueeze(-1), self._code_table()], dim=-1)

    def _code_table(self) -> Tensor:
        """The codes, (V, d), where the head is and in its type: it may be a copy without the autoencoder."""
        return self._codes[0].weight.to(self.scores.weight)
