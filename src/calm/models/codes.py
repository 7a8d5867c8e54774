"""The autoencoder without training: every token has a fixed random code, and a latent concatenates codes.

Encoding looks codes up; decoding takes the nearest one. All codes have norm sqrt(d), so that their entries
are on the scale of standard normal noise and the nearest code has the largest dot product.

Shapes: P positions (chunks), K tokens per chunk, d size of a code, Z = K·d latent size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from calm.core.gaussian import DiagonalGaussian
from calm.models.configuration import CalmAutoencoderConfig

_LOG_STD = -10.0  # Codes have no variance, but its logarithm must be finite.


def draw_codes(embedding: nn.Embedding) -> None:
    """Initialize codes as random directions of norm sqrt(d); loaded codes are kept."""
    init.normal_(embedding.weight)
    init.copy_(embedding.weight, F.normalize(embedding.weight, dim=-1) * embedding.embedding_dim**0.5)


class CodeEncoder(nn.Module):
    """Tokens -> their codes."""

    def __init__(self, config: CalmAutoencoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, tokens_PK: Tensor) -> DiagonalGaussian:
        """Posterior of each chunk, (P, Z): its codes, with negligible variance."""
        latents_PZ = self.embed_tokens(tokens_PK).flatten(-2)
        return DiagonalGaussian(latents_PZ, torch.full_like(latents_PZ, _LOG_STD))


class CodeDecoder(nn.Module):
    """Latents -> one vector per token, whose dot products with the codes are the logits."""

    def __init__(self, config: CalmAutoencoderConfig) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size

    def forward(self, latents_PZ: Tensor) -> Tensor:
        """Token vectors, (P, K, d)."""
        return self.token_vectors(latents_PZ, 0, self.chunk_size)

    def chunk_states(self, latents_PZ: Tensor) -> Tensor:
        """The part of decoding that all tokens of a chunk share: the latent itself, (P, Z)."""
        return latents_PZ

    def token_vectors(self, states_PZ: Tensor, first: int, last: int) -> Tensor:
        """Vectors of the tokens at positions first..last-1 of the chunk, (P, last - first, d)."""
        return states_PZ.unflatten(-1, (self.chunk_size, -1))[..., first:last, :]
