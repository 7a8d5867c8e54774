"""Building blocks shared by the autoencoder, the input projection and the heads."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLUBlock(nn.Module):
    """Residual gated MLP with RMSNorm in front: x + down(silu(gate(n)) * up(n)), n = norm(x)."""

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the block to the last axis; the shape is kept."""
        normed = self.norm(hidden)
        return hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))


class ZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero (the model's initialisation sees to it)."""


class ChunkProjection(nn.Module):
    """The K token embeddings of a chunk -> one input vector of the backbone (paper section 3.4)."""

    def __init__(self, chunk_size: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.expand = nn.Linear(chunk_size * hidden_size, 2 * hidden_size)
        self.squeeze = nn.Linear(2 * hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, embeddings_BTD: Tensor) -> Tensor:
        """Token embeddings (B, T, D) -> chunk vectors (B, T / K, D)."""
        batch, num_tokens, hidden_size = embeddings_BTD.shape
        chunks = embeddings_BTD.reshape(batch, num_tokens // self.chunk_size, -1)
        assert chunks.shape[-1] == self.chunk_size * hidden_size
        return self.norm(self.squeeze(F.silu(self.expand(chunks))))
