"""Hidden states of the backbone -> next chunks, at any temperature.

Shapes: N draws, P positions, K tokens per chunk, D hidden size, Z latent size.
"""

import torch
from torch import Tensor

from calm.core.random import Randomness, select_rows
from calm.core.temperature import ChunkSample, TemperatureSettings, sample
from calm.models.autoencoder import CalmAutoencoder
from calm.models.heads import GenerativeHead


class ChunkSamplingMixin:
    """Draws of the next chunk for models with a generative head and an autoencoder."""

    autoencoder: CalmAutoencoder
    head: GenerativeHead

    @torch.no_grad()
    def sample_chunks(
        self,
        hidden_PD: Tensor,
        settings: TemperatureSettings,
        randomness: Randomness = None,
    ) -> ChunkSample:
        """One next chunk for every backbone state, and what it took.

        Args:
            hidden_PD: States of the last chunk.
            settings: Sampler and temperature.
            randomness: Source of the draws and choices: one generator, or one for each position.

        Raises:
            ValueError: If there is no position, or a latent is not finite.
        """
        prepared_P = self.head.prepare(hidden_PD)

        def draw(num_draws: int, rows: Tensor) -> Tensor:
            chosen = prepared_P if len(rows) == len(prepared_P) else prepared_P[rows.to(prepared_P.device)]
            return self._decode(self.head.draw(chosen, num_draws, select_rows(randomness, rows)))

        return sample(draw, len(hidden_PD), settings, randomness)

    @torch.no_grad()
    def draw_chunks(self, hidden_PD: Tensor, num_draws: int, randomness: Randomness = None) -> Tensor:
        """Independent draws of the next chunk at temperature 1, (N, P, K)."""
        return self._decode(self.head.sample(hidden_PD, num_draws, randomness))

    def _decode(self, latents_NPZ: Tensor) -> Tensor:
        if not bool(latents_NPZ.isfinite().all()):
            raise ValueError(
                f"the head drew a latent that is not finite (in {latents_NPZ.dtype}); "
                "the weights may be damaged, or the dtype too narrow for them."
            )
        return self.autoencoder.decode_tokens(latents_NPZ)
