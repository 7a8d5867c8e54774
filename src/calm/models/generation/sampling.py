"""Backbone states -> next chunks, at any temperature.

Shapes: P positions, R of them that draw again, N draws, K tokens per chunk, D state size, Z size of a latent,
M draws that are decoded together, X size of a decoder state.
"""

import torch
from torch import Tensor

from calm.core.pool import TokenReader
from calm.core.random import Randomness, select_rows
from calm.core.samplers import HeadSampler, Sampler
from calm.core.temperature import ChunkSample
from calm.models.autoencoder import CalmAutoencoder
from calm.models.generation.ahead import CompiledSteps
from calm.models.generation.model import ChunkModel
from calm.models.heads import GenerativeHead, LatentHead
from calm.models.heads.contract import require_finite

# If the vocabulary projection has at least this many weights, tokens are decoded only where they matter. With
# fewer, decoding all K of every draw is cheaper than finding out which (docs/benchmarks/sampling.md).
_LARGE_PROJECTION = 2**22
# Even then, up to this many draws are decoded in full: for fewer than about 20 vectors, a product with a
# large matrix costs what reading the matrix costs.
_FEW_DRAWS = 16


def prepare(model: ChunkModel, states_PD: Tensor, compiled: CompiledSteps | None = None) -> Tensor:
    """Output of the head's `prepare`, from the compiled functions of the model if there are any."""
    return model.head.prepare(states_PD) if compiled is None else compiled.prepare(states_PD)


@torch.no_grad()
def sample_chunks(
    model: ChunkModel,
    states_PD: Tensor,
    sampler: Sampler,
    randomness: Randomness = None,
    compiled: CompiledSteps | None = None,
) -> ChunkSample:
    """Sample one next chunk per state, with statistics.

    Args:
        model: The model.
        states_PD: States of the last chunk.
        sampler: How a chunk is chosen from draws.
        randomness: Source of the draws and choices: one generator, or one per position.
        compiled: Compiled functions of the model, for the draws.

    Raises:
        ValueError: If there is no position, the weights are damaged, or the head is asked for a temperature
            that it does not support.
    """
    head = model.head
    check_sampler(head, sampler)
    prepared_P = prepare(model, states_PD, compiled)
    # A single draw is decoded in full.
    lazily = isinstance(head, LatentHead) and sampler.most_draws > 1 and _is_large(model.autoencoder)
    reader = _DecoderReader(model.autoencoder) if lazily else None

    def draw(num_draws: int, rows_R: Tensor, temperature: float = 1.0) -> Tensor:
        prepared_R, randomness_R = prepared_P, randomness
        if not torch.equal(rows_R.cpu(), torch.arange(len(prepared_P))):
            prepared_R = prepared_P[rows_R.to(prepared_P.device)]
            randomness_R = select_rows(randomness, rows_R)
        if reader is None or not isinstance(head, LatentHead):
            chunks_NRK = None
            if compiled is not None:
                chunks_NRK = compiled.draw(prepared_R, num_draws, randomness_R, temperature)
            if chunks_NRK is None:
                chunks_NRK = head.draw_chunks(prepared_R, num_draws, randomness_R, temperature)
            return chunks_NRK
        head.check_temperature(temperature)  # As `draw_chunks` does.
        latents_NRZ = head.draw_latents(prepared_R, num_draws, randomness_R, temperature=temperature)
        require_finite(latents_NRZ)
        return model.autoencoder.chunk_states(latents_NRZ)

    return sampler.sample(draw, len(states_PD), randomness, reader)


def check_sampler(head: GenerativeHead, sampler: Sampler) -> None:
    """Raise ValueError if the sampler asks the head for a temperature that it does not support."""
    if isinstance(sampler, HeadSampler):
        head.check_temperature(sampler.temperature, is_asked=True)


def _is_large(autoencoder: CalmAutoencoder) -> bool:
    return autoencoder.config.vocab_size * autoencoder.config.hidden_size >= _LARGE_PROJECTION


class _DecoderReader(TokenReader):
    """Decodes tokens from the autoencoder's chunk states."""

    def __init__(self, autoencoder: CalmAutoencoder) -> None:
        self.chunk_size = autoencoder.config.chunk_size
        self._autoencoder = autoencoder

    def __call__(self, states_MX: Tensor, position: int) -> Tensor:
        end = self.chunk_size if len(states_MX) <= _FEW_DRAWS else position + 1
        return self._autoencoder.read_tokens(states_MX, position, end)
