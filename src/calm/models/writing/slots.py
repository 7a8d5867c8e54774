"""Keys and values of all chunks so far, written in place: nothing is copied as a text grows.

Shapes: R rows, C chunks, H heads of keys and values, d their size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
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
            mask_RC: 1 on chunks of the text; padding may be anywhere.
            room: Chunks to come.
        """
        num_rows, width = mask_RC.shape
        # Row by row, the chunks of the text, and nothing behind them: attention gives that no weight, but no
        # weight of what is not finite is not a number.
        index_RC = mask_RC.argsort(dim=-1, descending=True, stable=True)
        is_empty_CR = mask_RC.gather(1, index_RC).T == 0
        rows_R1 = torch.arange(num_rows, device=mask_RC.device).unsqueeze(-1)
        capacity = _rounded(width + room)

        def moved(states_RHCd: Tensor) -> Tensor:
            slots_CRHd = states_RHCd.new_zeros(capacity, num_rows, states_RHCd.shape[1], states_RHCd.shape[3])
            rows, columns = rows_R1.to(states_RHCd.device), index_RC.to(states_RHCd.device)
            text_CRHd = states_RHCd[rows, :, columns].transpose(0, 1)
            slots_CRHd[:width] = text_CRHd.masked_fill(is_empty_CR[..., None, None].to(text_CRHd.device), 0)
            return slots_CRHd

        filled: Any = cache.layers
        return cls([(moved(layer.keys), moved(layer.values)) for layer in filled], mask_RC.sum(-1).tolist())

    @classmethod
    def joined(cls, parts: Sequence["SlotCache"]) -> "SlotCache":
        """The rows of several caches in one."""
        lengths = [length for part in parts for length in part.lengths]
        capacity = _rounded(max(lengths) + 1)

        def side_by_side(states: Sequence[Tensor]) -> Tensor:
            short = [one[:capacity] for one in states]
            return torch.cat([pad(one, (0, 0) * 3 + (0, capacity - len(one))) for one in short], dim=1)

        layers = []
        for layer in zip(*(part._layers for part in parts), strict=True):
            keys, values = zip(*layer, strict=True)
            layers.append((side_by_side(keys), side_by_side(values)))
        return cls(layers, lengths)

    def empty_row(self) -> "SlotCache":
        """A row of which nothing has been read, for the same layers."""
        nothing = [tuple(torch.zeros_like(states[:1, :1]) for states in layer) for layer in self._layers]
        return SlotCache([(keys, values) for keys, values in nothing], [0])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def window(self) -> list[Tensor]:
        """Keys and values of each layer in turn, views (C, R, H, d) with room for one more."""
        needed = max(self.lengths) + 1
        self._make_room(needed)
        width = _rounded(needed, _WINDOW)
        return [states[:width] for layer in self._layers for states in layer]

    def _make_room(self, needed: int) -> None:
        capacity = self._layers[0][0].shape[0]
        if needed > capacity:
            more = _rounded(max(needed, 2 * capacity)) - capacity
            self._layers = [
                (pad(keys, (0, 0) * 3 + (0, more)), pad(values, (0, 0) * 3 + (0, more)))
                for keys, values in self._layers
            ]

    def grow(self) -> None:
        """Count a chunk that was written behind every row."""
        self.lengths = [length + 1 for length in self.lengths]

    def replace(self, other: "SlotCache") -> None:
        """Become what another is."""
        self._layers, self.lengths = other._layers, other.lengths

    def shared(self) -> "SlotCache":
        """The same memory with other lengths: what one writes behind its rows, the other does not read."""
        return SlotCache(list(self._layers), self.lengths)

    def put(self, place: int, other: "SlotCache") -> None:
        """Overwrite a row by a single one."""
        [length] = other.lengths
        self._make_room(length + 1)
        for layer, of_other in zip(self._layers, other._layers, strict=True):
            for states_CRHd, of_other_C1Hd in zip(layer, of_other, strict=True):
                states_CRHd[:length, place] = of_other_C1Hd[:length, 0]
        self.lengths[place] = length

    def part(self, places: Sequence[int]) -> "SlotCache":
        """Some rows, which may be taken more than once, without room that none of them needs.

        They are copied, unless these are all rows.
        """
        if list(places) == list(range(len(self))):
            return self.shared()
        lengths = [self.lengths[place] for place in places]
        needed = _rounded(max(lengths, default=0) + 1)
        capacity = self._layers[0][0].shape[0]
        # Room that was made for chunks to come stays, unless it was for rows that are much longer.
        width = needed if capacity >= 2 * needed else capacity

        def chosen(states_CRHd: Tensor) -> Tensor:
            return states_CRHd[:width, torch.tensor(places, dtype=torch.long, device=states_CRHd.device)]

        return SlotCache([(chosen(keys), chosen(values)) for keys, values in self._layers], lengths)

    def slice(self, first: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of keys and values of some chunks of each layer, (end - first, R, H, d)."""
        return [(keys[first:end].clone(), values[first:end].clone()) for keys, values in self._layers]

    def to_transformers(self, config: PreTrainedConfig) -> tuple[DynamicCache, Tensor]:
        """The same as a cache of transformers, and its mask (R, C), 0 behind the shorter rows.

        Args:
            config: Of the backbone.
        """
        width, cache = max(self.lengths), DynamicCache(config=config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys[:width].permute(1, 2, 0, 3), values[:width].permute(1, 2, 0, 3), number)
        device = self._layers[0][0].device
        length_R1 = torch.tensor(self.lengths, device=device).unsqueeze(-1)
        return cache, (torch.arange(width, device=device) < length_R1).long()


def _rounded(length: int, step: int = _STEP) -> int:
    return -(-length // step) * step
