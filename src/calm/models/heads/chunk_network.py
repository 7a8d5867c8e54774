"""A residual MLP for the K tokens of a chunk, whose norms are shifted and scaled by the backbone's state.

Shapes: N inputs per position, P positions, K tokens per chunk, D hidden size, X size of an input, Y size of
an output, S blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.models.blocks import RecomputedBlock, ZeroLinear


class ChunkNetwork(nn.Module):
    """A state and an input per position -> K outputs, one per token of the chunk.

    All K use the same blocks; a learned embedding tells them apart.

    Args:
        hidden_size: Width of the backbone D.
        input_size: X.
        output_size: Y.
        chunk_size: K.
        num_blocks: S.
        eps: Epsilon of the norms.
    """

    def __init__(
        self,
        hidden_size: int,
        input_size: int,
        output_size: int,
        chunk_size: int,
        num_blocks: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.condition_in = nn.Linear(hidden_size, hidden_size)
        self.inp = nn.Linear(input_size, hidden_size)
        self.embed_places = nn.Embedding(chunk_size, hidden_size)
        self.blocks = nn.ModuleList(RecomputedBlock(hidden_size, eps) for _ in range(num_blocks))
        self.out_norm = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=False)
        self.out = ZeroLinear(hidden_size, output_size)
        self.direct = ZeroLinear(hidden_size, chunk_size * output_size)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that touch inputs or outputs."""
        return [self.inp, self.out, self.direct]

    def forward(self, states_PD: Tensor, inputs_PX: Tensor) -> Tensor:
        """Outputs (P, K, Y)."""
        condition_P1D = F.silu(self.condition_in(states_PD)).unsqueeze(1)
        x_PKD = self.inp(inputs_PX).unsqueeze(1) + self.embed_places.weight
        for block in self.blocks:
            x_PKD = block(x_PKD, condition_P1D)
        return self.out(self.out_norm(x_PKD)) + self.direct(states_PD).unflatten(-1, (self.chunk_size, -1))

    def prepare(self, states_PD: Tensor) -> Tensor:
        """What all inputs of a position share, (P, 3·D·S + K·Y): the blocks' modulations, and `direct`."""
        condition_PD = F.silu(self.condition_in(states_PD))
        modulations = [block.modulation(condition_PD) for block in self.blocks]  # type: ignore[operator]
        return torch.cat([*modulations, self.direct(states_PD)], dim=-1)

    def forward_prepared(self, prepared_P: Tensor, inputs_NPX: Tensor) -> Tensor:
        """Outputs (N, P, K, Y), given the output of `prepare` and N inputs per position."""
        width = 3 * self.inp.out_features
        *modulations, direct_P = prepared_P.split(
            [width] * len(self.blocks) + [self.direct.out_features], dim=-1
        )
        x_NPKD = self.inp(inputs_NPX).unsqueeze(-2) + self.embed_places.weight
        for block, modulation_P in zip(self.blocks, modulations, strict=True):
            x_NPKD = block.forward_modulated(x_NPKD, modulation_P.unsqueeze(-2))  # type: ignore[operator]
        return self.out(self.out_norm(x_NPKD)) + direct_P.unflatten(-1, (self.chunk_size, -1))


def multiply_adds(
    hidden_size: int, input_size: int, output_size: int, chunk_size: int, num_blocks: int
) -> tuple[int, int]:
    """Multiply-adds of `ChunkNetwork.prepare` per position, and of `forward_prepared` per input."""
    square = hidden_size * hidden_size
    per_position = square + 3 * num_blocks * square + hidden_size * chunk_size * output_size
    blocks_and_outputs = chunk_size * (2 * num_blocks * hidden_size + output_size) * hidden_size
    return per_position, input_size * hidden_size + blocks_and_outputs
