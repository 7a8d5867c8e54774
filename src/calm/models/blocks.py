"""Building blocks shared by the autoencoder, the input projection and the heads."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


class SwiGLUBlock(nn.Module):
    """Residual gated MLP with pre-RMSNorm: x + down(silu(gate(n)) * up(n)), n = norm(x)."""

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
    """A linear layer whose weights start at zero, set by the model's weight initialization."""


class AdaptiveBlock(nn.Module):
    """x + gate * mlp(norm(x), scaled and shifted): adaptive layer norm on a condition (paper section 3.2).

    New blocks are the identity. Shapes: N draws, P positions, D size.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=eps)
        self.up = nn.Linear(size, size)
        self.down = nn.Linear(size, size)
        self.modulation = ZeroLinear(size, 3 * size)

    def forward(self, x_NPD: Tensor, condition: Tensor) -> Tensor:
        """Apply the block to x (N, P, D) with a condition that broadcasts to its shape."""
        return self.forward_modulated(x_NPD, self.modulation(condition))

    def forward_modulated(self, x_NPD: Tensor, modulation: Tensor) -> Tensor:
        """Apply the block with precomputed shift, scale and gate, (..., 3 D)."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        normed_NPD = self.norm(x_NPD) * (1 + scale) + shift
        return x_NPD + gate * self.down(F.silu(self.up(normed_NPD)))


class RecomputedBlock(AdaptiveBlock, GradientCheckpointingLayer):
    """An `AdaptiveBlock` that is recomputed in the backward pass if gradient checkpointing is on."""


class SlicedLinear(nn.Linear):
    """A linear layer whose weights are used in slices. It is never called, so an adapter would do nothing."""


class ChunkProjection(nn.Module):
    """Features of a chunk, by default its K token embeddings -> one input vector (paper section 3.4)."""

    def __init__(self, input_size: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.expand = nn.Linear(input_size, 2 * hidden_size)
        self.squeeze = nn.Linear(2 * hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, chunks_BCX: Tensor) -> Tensor:
        """Chunks (B, C, X) -> vectors (B, C, D)."""
        return self.norm(self.squeeze(F.silu(self.expand(chunks_BCX))))


class LastTokenProjection(nn.Module):
    """The embedding of a chunk's last token plus a zero-initialized linear map of all its embeddings."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.mix = ZeroLinear(input_size, hidden_size, bias=False)

    def forward(self, chunks_BCX: Tensor) -> Tensor:
        """Chunks (B, C, X), X = K·D -> vectors (B, C, D)."""
        return chunks_BCX[..., -self.hidden_size :] + self.mix(chunks_BCX)
