"""Hidden states of the backbone -> next chunks, at any temperature.

Shapes: N draws, P positions, K tokens per chunk, D hidden size, Z latent size.
"""

import torch
from torch import Tensor

from calm.core.pool import TokenReader
from calm.core.random import Randomness, select_rows
from calm.core.temperature import ChunkSample, TemperatureSettings, sample
from calm.models.autoencoder import CalmAutoencoder
from calm.models.heads import GenerativeHead

# From so many weights of the vocabulary projection on, tokens are read only where they matter. With
# fewer, reading all K of every draw is cheaper than finding out which are needed (docs/benchmarks.md).
_LARGE_PROJECTION = 2**22
# So few draws are read whole even then: for fewer vectors than about 20, a pass over a large matrix costs
# what reading the matrix costs.
_FEW_DRAWS = 16


class _DecoderReader(TokenReader):
    """Reads tokens of the autoencoder's chunk states."""

    def __init__(self, autoencoder: CalmAutoencoder) -> None:
        self.chunk_size = autoencoder.config.chunk_size
        self._autoencoder = autoencoder

    def __call__(self, states_MX: Tensor, place: int) -> Tensor:
        last = self.chunk_size if len(states_MX) <= _FEW_DRAWS else place + 1
        return self._autoencoder.read_tokens(states_MX, place, last)


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
            ValueError: If there is no position, a latent is not finite, or the head is asked for a
                temperature that it does not take.
        """
        self.check_sampler(settings)
        prepared_P = self.head.prepare(hidden_PD)
        config = self.autoencoder.config
        is_large = config.vocab_size * config.hidden_size >= _LARGE_PROJECTION
        decode = self.autoencoder.chunk_states if is_large else self.autoencoder.decode_tokens

        def draw(num_draws: int, rows: Tensor) -> Tensor:
            chosen = prepared_P if len(rows) == len(prepared_P) else prepared_P[rows.to(prepared_P.device)]
            own = select_rows(randomness, rows)
            if settings.sampler == "head" and settings.temperature < 1:
                return decode(_finite(self.head.draw_at(settings.temperature, chosen, num_draws, own)))
            return decode(_finite(self.head.draw(chosen, num_draws, own)))

        reader = _DecoderReader(self.autoencoder) if is_large else None
        return sample(draw, len(hidden_PD), settings, randomness, reader)

    def default_sampler(self, temperature: float) -> str:
        """The sampler where none is named: the head's own, which costs one draw, where there is one."""
        lowest = self.head.lowest_temperature
        return "head" if lowest < 1 and temperature >= lowest else "exact"

    def check_sampler(self, settings: TemperatureSettings) -> None:
        """Raise ValueError if the head is asked for a temperature that it does not take."""
        if settings.sampler != "head":
            return
        lowest, name = self.head.lowest_temperature, self.head.config.head_type
        if lowest == 1:
            raise ValueError(f"a {name} head does not take a temperature; use the sampler 'exact' or 'pool'.")
        if settings.temperature < lowest:
            raise ValueError(
                f"a {name} head takes temperatures from {lowest:g} to 1, got {settings.temperature:g}; "
                "sampler='pool' gives the commonest chunk at 0."
            )

    @torch.no_grad()
    def draw_chunks(self, hidden_PD: Tensor, num_draws: int, randomness: Randomness = None) -> Tensor:
        """Independent draws of the next chunk at temperature 1, (N, P, K)."""
        return self.autoencoder.decode_tokens(_finite(self.head.sample(hidden_PD, num_draws, randomness)))


def _finite(latents_NPZ: Tensor) -> Tensor:
    """The latents, after a check."""
    if not bool(latents_NPZ.isfinite().all()):
        raise ValueError(
            f"the head drew a latent that is not finite (in {latents_NPZ.dtype}); "
            "the weights may be damaged, or the dtype too narrow for them."
        )
    return latents_NPZ
