"""The backbone as text is written: the whole prompt first, then chunk after chunk.

Shapes: B batch, T tokens, C chunks, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from calm.models.writing.model import ChunkModel
from calm.models.writing.prompts import Prompt, positions_of, read_chunks

# Lengths of static caches are powers of two from here on: texts of many lengths share a compiled step.
_SHORTEST_STATIC = 64


class BackboneSteps:
    """States that predict the next chunk, for prompts and what is written after them.

    Args:
        model: The model.
        prompt: The prompts.
        num_steps: Chunks that will be written at most.
        config: Used are `use_cache`, `cache_implementation` ("dynamic" or "static"), `compile_config` and
            `disable_compile`. With a compile config, steps after the prompt run compiled; it needs the
            static cache, whose shapes do not change.

    Raises:
        ValueError: If the cache is of another kind, or a step cannot be compiled with it.
    """

    def __init__(self, model: ChunkModel, prompt: Prompt, num_steps: int, config: GenerationConfig) -> None:
        self._model = model
        mask_BC = prompt.mask_BC
        self._length = mask_BC.shape[1]
        self._mask_BC = torch.cat([mask_BC, mask_BC.new_ones(len(mask_BC), num_steps - 1)], dim=1)
        self._cache = self._new_cache(config)
        self._position_BC = positions_of(self._mask_BC)
        self._compile_config = _compile_config(config)
        self._seen_BT: Tensor | None = None

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """State of the last chunk, (B, D).

        Args:
            tokens_BT: The prompts at first, then the tokens of the chunk that was written.
        """
        earlier_BT = self._seen_BT
        if earlier_BT is not None:
            self._length += 1
            if self._cache is None:
                tokens_BT = torch.cat([earlier_BT, tokens_BT], dim=1)
        self._seen_BT = tokens_BT
        size = self._model.config.chunk_size
        position_BC = self._position_BC[:, : self._length]
        # A static cache has one shape for all steps; attention does not look ahead.
        length = None if isinstance(self._cache, StaticCache) else self._length
        forward: Any = None
        if self._compile_config is not None and earlier_BT is not None:
            forward = self._model.get_compiled_call(self._compile_config)
        # Copied: the strides of a part differ from step to step, and each would be compiled anew.
        own_BC = position_BC[:, -(tokens_BT.shape[1] // size) :].clone(memory_format=torch.contiguous_format)
        states_BCD = read_chunks(
            self._model, tokens_BT, self._mask_BC[:, :length], own_BC, self._cache, forward
        )
        return states_BCD[:, -1]

    def _new_cache(self, config: GenerationConfig) -> Cache | None:
        kind = config.cache_implementation or "dynamic"
        if kind not in ("dynamic", "static"):
            raise ValueError(f"cache_implementation must be 'dynamic' or 'static', got '{kind}'.")
        if config.use_cache is False:
            return None
        backbone = self._model.config.backbone
        if kind == "dynamic":
            return DynamicCache(config=backbone)
        length = max(_SHORTEST_STATIC, 1 << (self._mask_BC.shape[1] - 1).bit_length())
        self._mask_BC = torch.nn.functional.pad(self._mask_BC, (0, length - self._mask_BC.shape[1]), value=1)
        return StaticCache(config=backbone, max_cache_len=length)


def _compile_config(config: GenerationConfig) -> CompileConfig | None:
    if config.compile_config is None or config.disable_compile:
        return None
    if config.use_cache is False or config.cache_implementation != "static":
        raise ValueError("a compile_config needs cache_implementation='static'.")
    return config.compile_config
