"""A residual MLP for the K tokens of a chunk, whose norms are shifted and scaled by the backbone's state.

Shapes: P positions, K tokens per chunk, D hidden size, X size of an input, Y size of an output, S blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.models.blocks import RecomputedBlock, ZeroLinear


class PlaceNetwork(nn.Module):
    """States and one input per position -> K outputs, from blocks that all K share.

    Args:
        hidden_size: Width of the backbone D.
        input_size: X.
        output_size: Y.
        num_places: K.
        num_blocks: S.
        eps: Epsilon of the norms.
    """

    def __init__(
        self,
        hidden_size: int,
        input_size: int,
        output_size: int,
        num_places: int,
        num_blocks: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.num_places = num_places
        self.condition_in = nn.Linear(hidden_size, hidden_size)
        self.inp = nn.Linear(input_size, hidden_size)
        self.embed_places = nn.Embedding(num_places, hidden_size)
        self.blocks = nn.ModuleList(RecomputedBlock(hidden_size, eps) for _ in range(num_blocks))
        self.out_norm = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=False)
        self.out = ZeroLinear(hidden_size, output_size)
        self.direct = ZeroLinear(hidden_size, num_places * output_size)

    def boundary_layers(self) -> list[nn.Module]:
        """The layers that touch inputs or outputs."""
        return [self.inp, self.out, self.direct]

    def forward(self, states_PD: Tensor, inputs_PX: Tensor) -> Tensor:
        """Outputs (P, K, Y)."""
        condition_P1D = F.silu(self.condition_in(states_PD)).unsqueeze(1)
        x_PKD = self.inp(inputs_PX).unsqueeze(1) + self.embed_places.weight
        for block in self.blocks:
            x_PKD = block(x_PKD, condition_P1D)
        return self.out(self.out_norm(x_PKD)) + self.direct(states_PD).unflatten(-1, (self.num_places, -1))

    def prepare(self, states_PD: Tensor) -> Tensor:
        """What all inputs of a position share, (P, 3·D·S + K·Y)."""
        condition_PD = F.silu(self.condition_in(states_PD))
        modulations = [block.modulation(condition_PD) for block in self.blocks]  # type: ignore[operator]
        return torch.cat([*modulations, self.direct(states_PD)], dim=-1)

    def after(self, prepared_PY: Tensor, inputs_NPX: Tensor) -> Tensor:
        """Outputs (N, P, K, Y) given the output of `prepare`, for N inputs per position."""
        width = 3 * self.inp.out_features
        *modulations, direct_PY = prepared_PY.split(
            [width] * len(self.blocks) + [self.direct.out_features], dim=-1
        )
        x_NPKD = self.inp(inputs_NPX).unsqueeze(-2) + self.embed_places.weight
        for block, modulation_PX in zip(self.blocks, modulations, strict=True):
            x_NPKD = block.modulated(x_NPKD, modulation_PX.unsqueeze(-2))  # type: ignore[operator]
        return self.out(self.out_norm(x_NPKD)) + direct_PY.unflatten(-1, (self.num_places, -1))


def multiply_adds(
    hidden_size: int, input_size: int, output_size: int, num_places: int, num_blocks: int
) -> tuple[int, int]:
    """Multiply-adds of `PlaceNetwork.prepare` per position, and of `after` per input."""
    square = hidden_size * hidden_size
    prepared = square + 3 * num_blocks * square + hidden_size * num_places * output_size
    of_places = num_places * (2 * num_blocks * hidden_size + output_size) * hidden_size
    return prepared, input_size * hidden_size + of_places
