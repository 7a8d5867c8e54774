"""Prefix cache: prefixes that prompts share are read once.

Shapes: C chunks, K tokens per chunk.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from calm.errors import reason_of
from calm.models.generation.slots import SlotCache

logger = logging.getLogger(__name__)
_BLOCK = 8  # Chunks that are cached or evicted together.
_Layers = list[tuple[Tensor, Tensor]]


class PrefixStore:
    """Keys and values of prompt prefixes in blocks of eight chunks; the least recently used are evicted.

    A prompt ends with a whole chunk, so two share chunks only if their lengths differ by a multiple of K: of
    a common prefix, up to K versions are kept. A prompt larger than the whole memory evicts no others: only
    what fits beside them is kept. Errors here are logged, and do not affect generation.

    Args:
        max_bytes: Memory for all blocks together; 0 caches nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._blocks: OrderedDict[bytes, _Layers] = OrderedDict()

    def num_cached(self, names: Sequence[bytes]) -> int:
        """Number of a prefix's chunks that are cached, given the names of its blocks."""
        return _BLOCK * sum(1 for _ in takewhile(self._blocks.__contains__, names))

    def find(self, chunks_CK: Tensor) -> SlotCache | None:
        """The longest cached prefix, without the last chunk, whose state is needed.

        Args:
            chunks_CK: A prompt.
        """
        try:
            return self._find(chunks_CK)
        except Exception as error:
            logger.warning("prefix cache lookup failed; reading the whole prompt (%s)", reason_of(error))
            return None

    def _find(self, chunks_CK: Tensor) -> SlotCache | None:
        names = []
        for name in block_names(chunks_CK[:-1]):
            if name not in self._blocks:
                break
            names.append(name)
        if not names:
            return None
        self._touch(names)
        per_layer = zip(*(self._blocks[name] for name in names), strict=True)
        layers = [
            (
                torch.cat([keys for keys, _ in blocks], dim=2),
                torch.cat([values for _, values in blocks], dim=2),
            )
            for blocks in per_layer
        ]
        return SlotCache(layers, [len(names) * _BLOCK])

    def keep(self, chunks_CK: Tensor, cache: SlotCache) -> None:
        """Cache the complete blocks of a prompt.

        Args:
            chunks_CK: The prompt.
            cache: Its keys and values, a single row.
        """
        try:
            self._keep(list(block_names(chunks_CK)), cache)
        except Exception as error:
            logger.warning("prefix was not cached (%s)", reason_of(error))

    def _keep(self, names: list[bytes], cache: SlotCache) -> None:
        self._touch([name for name in names if name in self._blocks])
        for index, name in enumerate(names):
            if name in self._blocks:
                continue
            block = cache.chunks(index * _BLOCK, (index + 1) * _BLOCK)
            size = _size(block)
            if len(names) * size > self._max_bytes < self._bytes + size:
                break
            while self._bytes + size > self._max_bytes:
                _, evicted = self._blocks.popitem(last=False)  # Not of this prompt: those were just touched.
                self._bytes -= _size(evicted)
            self._blocks[name] = [(keys.clone(), values.clone()) for keys, values in block]
            self._bytes += size
        self._touch([name for name in names if name in self._blocks])

    def _touch(self, names: list[bytes]) -> None:
        """Mark blocks as used; the first is evicted last, since without it those after it are not found."""
        for name in reversed(names):
            self._blocks.move_to_end(name)


def block_names(chunks_CK: Tensor) -> Iterator[bytes]:
    """The name of each complete block: a hash of it and everything before it."""
    name, tokens_CK = b"", chunks_CK.cpu().numpy()
    for end in range(_BLOCK, len(tokens_CK) + 1, _BLOCK):
        name = hashlib.sha256(name + tokens_CK[end - _BLOCK : end].tobytes()).digest()
        yield name


def _size(block: _Layers) -> int:
    return sum(states.nbytes for layer in block for states in layer)
