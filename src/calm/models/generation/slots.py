"""A KV cache that is written in place: it is copied only when it runs out of room.

Shapes: R rows, C chunks, H key/value heads, d head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

# Attention reads the whole capacity, so it grows in small steps; for long texts by an eighth, since growing
# copies the cache.
_STEP, _SHARE = 16, 8


class SlotCache:
    """A cache in which every row starts at slot 0 and has its own length.

    Args:
        layers: Keys and values of each layer, (R, H, C, d).
        lengths: Chunks in each row.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        self._layers, self.lengths = layers, list(lengths)

    @classmethod
    def of(cls, cache: DynamicCache, mask_RC: Tensor) -> "SlotCache":
        """Convert a cache of transformers that a forward pass has filled.

        Args:
            cache: The cache.
            mask_RC: 1 on chunks of the text; padding may be anywhere.
        """
        width = mask_RC.shape[1]
        # Each row's chunks move to the front, with zeros after them: attention gives what follows a row zero
        # weight, but zero times a non-finite value is NaN.
        index_RC = mask_RC.argsort(dim=-1, descending=True, stable=True)
        is_empty_RC = mask_RC.gather(1, index_RC) == 0
        room = _rounded(width + 1) - width

        def moved(states_RHCd: Tensor) -> Tensor:
            index_R1C1 = index_RC[:, None, :, None].to(states_RHCd.device)
            is_empty_R1C1 = is_empty_RC[:, None, :, None].to(states_RHCd.device)
            text_RHCd = states_RHCd.gather(2, index_R1C1.expand_as(states_RHCd))
            return pad(text_RHCd.masked_fill(is_empty_R1C1, 0), (0, 0, 0, room))

        filled: Any = cache.layers
        return cls([(moved(layer.keys), moved(layer.values)) for layer in filled], mask_RC.sum(-1).tolist())

    @classmethod
    def concat(cls, parts: Sequence["SlotCache"]) -> "SlotCache":
        """The rows of several caches in one."""
        lengths = [length for part in parts for length in part.lengths]
        capacity = _rounded(max(lengths) + 1)

        def side_by_side(states: Sequence[Tensor]) -> Tensor:
            short = [states_RHCd[:, :, :capacity] for states_RHCd in states]
            padded = [pad(states_RHCd, (0, 0, 0, capacity - states_RHCd.shape[2])) for states_RHCd in short]
            return torch.cat(padded)

        layers = []
        for layer in zip(*(part._layers for part in parts), strict=True):
            keys, values = zip(*layer, strict=True)
            layers.append((side_by_side(keys), side_by_side(values)))
        return cls(layers, lengths)

    def empty_row(self) -> "SlotCache":
        """An empty row for the same layers."""
        layers = [
            (torch.zeros_like(keys[:1, :, :1]), torch.zeros_like(values[:1, :, :1]))
            for keys, values in self._layers
        ]
        return SlotCache(layers, [0])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def has_room(self, row: int) -> bool:
        """Whether one more chunk of a row fits into the allocated memory."""
        return self.lengths[row] < self._layers[0][0].shape[2]

    def window(self) -> list[Tensor]:
        """Keys and values of each layer in turn, (R, H, C, d), with room for one more chunk."""
        self._make_room(max(self.lengths) + 1)
        return [states for layer in self._layers for states in layer]

    def _make_room(self, needed: int) -> None:
        capacity = self._layers[0][0].shape[2]
        if needed > capacity:
            more = _rounded(max(needed, capacity + capacity // _SHARE)) - capacity
            # One layer at a time, so that only one is in memory twice.
            for index, (keys, values) in enumerate(self._layers):
                self._layers[index] = (pad(keys, (0, 0, 0, more)), pad(values, (0, 0, 0, more)))

    def grow(self) -> None:
        """Count a chunk that was written after the end of every row."""
        self.lengths = [length + 1 for length in self.lengths]

    def replace(self, other: "SlotCache") -> None:
        """Take over the contents of another."""
        self._layers, self.lengths = other._layers, other.lengths

    def shared(self) -> "SlotCache":
        """The same memory with separate lengths: what one writes after its rows, the other does not read."""
        return SlotCache(list(self._layers), self.lengths)

    def put(self, row: int, other: "SlotCache") -> None:
        """Overwrite a row with a single-row cache, and zeros after its end: see `of`."""
        [length] = other.lengths
        self._make_room(length + 1)
        for layer, other_layer in zip(self._layers, other._layers, strict=True):
            for states_RHCd, other_1HCd in zip(layer, other_layer, strict=True):
                states_RHCd[row, :, :length] = other_1HCd[0, :, :length]
                states_RHCd[row, :, length:] = 0
        self.lengths[row] = length

    def select(self, rows: Sequence[int]) -> "SlotCache":
        """Some rows, which may be repeated, without capacity that none of them needs.

        They are copied, unless these are all rows in order.
        """
        if list(rows) == list(range(len(self))):
            return self.shared()
        lengths = [self.lengths[row] for row in rows]
        width = _rounded(max(lengths, default=0) + 1)

        def chosen(states_RHCd: Tensor) -> Tensor:
            index_R = torch.tensor(rows, dtype=torch.long, device=states_RHCd.device)
            return states_RHCd[:, :, :width].index_select(0, index_R)

        return SlotCache([(chosen(keys), chosen(values)) for keys, values in self._layers], lengths)

    def chunks(self, first: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """Views of the keys and values of some chunks of each layer, (R, H, end - first, d)."""
        return [(keys[:, :, first:end], values[:, :, first:end]) for keys, values in self._layers]

    def to_transformers(self, config: PreTrainedConfig) -> tuple[DynamicCache, Tensor]:
        """Convert to a cache of transformers, and its mask (R, C), 0 after the end of shorter rows.

        Args:
            config: The backbone's configuration.
        """
        width, cache = max(self.lengths), DynamicCache(config=config)
        for layer, (keys, values) in enumerate(self._layers):
            cache.update(keys[:, :, :width], values[:, :, :width], layer)
        device = self._layers[0][0].device
        length_R1 = torch.tensor(self.lengths, device=device).unsqueeze(-1)
        return cache, (torch.arange(width, device=device) < length_R1).long()


def _rounded(length: int) -> int:
    return -(-length // _STEP) * _STEP
