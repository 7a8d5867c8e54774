"""Keys and values of all chunks so far, written in place: nothing is copied as a text grows.

Shapes: R rows, C chunks, H heads of keys and values, d their size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

_STEP = 64  # Room is made for so many chunks at a time,
_WINDOW = 16  # and attention looks at whole multiples of this.


class SlotCache:
    """A cache in which every row begins at the front and has a length of its own.

    Args:
        layers: Keys and values of each layer, (C, R, H, d); chunks come first, so that those in use are one
            piece of memory.
        lengths: Chunks of each row.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        self._layers, self.lengths = layers, list(lengths)

    @classmethod
    def of(cls, cache: DynamicCache, mask_RC: Tensor, room: int = 1) -> "SlotCache":
        """What a forward pass has left in a cache of transformers.

        Args:
            cache: Its cache.
            mask_RC: 1 on chunks of the text, padding in front.
            room: Chunks to come.
        """
        num_rows, width = mask_RC.shape
        lengths_R = mask_RC.sum(-1)
        # Row by row, the chunks behind the padding; what follows them is written before it is read.
        column_RC = (width - lengths_R).unsqueeze(-1) + torch.arange(width, device=mask_RC.device)
        index_RC = column_RC.clamp_max(width - 1)
        rows_R1 = torch.arange(num_rows, device=mask_RC.device).unsqueeze(-1)
        capacity = _rounded(width + room)

        def moved(states_RHCd: Tensor) -> Tensor:
            slots_CRHd = states_RHCd.new_zeros(capacity, num_rows, states_RHCd.shape[1], states_RHCd.shape[3])
            slots_CRHd[:width] = states_RHCd[rows_R1, :, index_RC].transpose(0, 1)
            return slots_CRHd

        filled: Any = cache.layers
        return cls([(moved(layer.keys), moved(layer.values)) for layer in filled], lengths_R.tolist())

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def window(self) -> list[Tensor]:
        """Keys and values of each layer in turn, views (C, R, H, d) with room for one more."""
        needed = max(self.lengths) + 1
        capacity = self._layers[0][0].shape[0]
        if needed > capacity:
            more = _rounded(max(needed, 2 * capacity)) - capacity
            pad = torch.nn.functional.pad
            self._layers = [
                (pad(keys, (0, 0) * 3 + (0, more)), pad(values, (0, 0) * 3 + (0, more)))
                for keys, values in self._layers
            ]
        width = _rounded(needed, _WINDOW)
        return [states[:width] for layer in self._layers for states in layer]

    def grow(self) -> None:
        """Count a chunk that was written behind every row."""
        self.lengths = [length + 1 for length in self.lengths]

    def keep(self, places: Sequence[int]) -> None:
        """Let the other rows go."""
        if len(places) == len(self.lengths):
            return
        device = self._layers[0][0].device
        chosen = torch.tensor(places, dtype=torch.long, device=device)
        self._layers = [(keys[:, chosen], values[:, chosen]) for keys, values in self._layers]
        self.lengths = [self.lengths[place] for place in places]


def _rounded(length: int, step: int = _STEP) -> int:
    return -(-length // step) * step
