"""Backbone steps of generation: first the whole prompt, then chunk by chunk.

Shapes: B rows of the batch, T tokens, K tokens per chunk, C chunks, A rows that have not ended.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from calm.core.chunks import positions_of
from calm.models.generation.ahead import CompiledSteps, find_steps
from calm.models.generation.lean import ChunkStep, can_step
from calm.models.generation.model import ChunkModel
from calm.models.generation.prompts import Prompt, read_chunks
from calm.models.generation.slots import SlotCache

# Lengths of static caches are powers of two from here on, so texts of many lengths share a compiled step.
_SHORTEST_STATIC = 64


class Steps(Protocol):
    """Computes the states (A, D) that predict each row's next chunk, for prompts and what follows them."""

    @property
    def compiled(self) -> CompiledSteps | None:
        """Compiled functions of the model, if they may be used."""

    def read(self) -> Tensor:
        """Read the prompts."""

    def advance(self, chunks_AK: Tensor) -> Tensor:
        """Read one more chunk of every remaining row."""

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only these of the remaining rows."""


def steps_of(model: ChunkModel, prompt: Prompt, num_steps: int, config: GenerationConfig) -> Steps:
    """Choose the kind of steps: lean ones, unless settings or the model require those of transformers.

    Args:
        model: The model.
        prompt: The prompts.
        num_steps: Maximum number of chunks to generate.
        config: `use_cache`, `cache_implementation`, `compile_config` and `disable_compile` are used; the last
            also disables what was compiled ahead of time.

    Raises:
        ValueError: If the cache is of another kind, or a step cannot be compiled with it.
    """
    needs_transformers = config.use_cache is False or config.cache_implementation or config.compile_config
    if needs_transformers or not can_step(model):
        return TransformersSteps(model, prompt, num_steps, config)
    # Compiled functions ignore autocast.
    may_be_compiled = not config.disable_compile and not torch.is_autocast_enabled(model.device.type)
    return LeanSteps(model, prompt, may_be_compiled)


class SlotSteps:
    """Steps for the rows of a `SlotCache`: compiled, or lean, or with the model's own forward pass.

    The last is for layers that lean steps do not support; see `can_step`.

    Args:
        model: The model, whose layers must not change.
        may_be_compiled: Whether to use compiled functions of the model where they apply.
    """

    def __init__(self, model: ChunkModel, may_be_compiled: bool = True) -> None:
        self._model, self._step = model, ChunkStep(model) if can_step(model) else None
        self.compiled = find_steps(model) if may_be_compiled and self._step is not None else None

    def advance(self, chunks_RK: Tensor, cache: SlotCache) -> Tensor:
        """States (R, D) that predict each row's next chunk; these chunks are added to the cache."""
        if self._step is None:
            return self._forward(chunks_RK, cache)
        window = cache.window()
        length_R = torch.tensor(cache.lengths, device=chunks_RK.device)
        states_RD = None if self.compiled is None else self.compiled.advance(chunks_RK, length_R, window)
        if states_RD is None:
            states_RD = self._step(chunks_RK, length_R, window)
        cache.grow()
        return states_RD

    def _forward(self, chunks_RK: Tensor, cache: SlotCache) -> Tensor:
        earlier, mask_RC = cache.to_transformers(self._model.config.backbone)
        mask_RC = torch.cat([mask_RC, torch.ones_like(mask_RC[:, :1])], dim=1).to(chunks_RK.device)
        position_R1 = torch.tensor(cache.lengths, device=chunks_RK.device).unsqueeze(-1)
        states_R1D = read_chunks(self._model, chunks_RK, mask_RC, position_R1, earlier)
        cache.replace(SlotCache.of(earlier, mask_RC))
        return states_R1D[:, -1]


class LeanSteps:
    """Steps that do no more than a chunk needs; see `calm.models.generation.lean`.

    Args:
        model: The model.
        prompt: The prompts.
        may_be_compiled: Whether to use compiled functions of the model where they apply.
    """

    def __init__(self, model: ChunkModel, prompt: Prompt, may_be_compiled: bool) -> None:
        self._model, self._prompt = model, prompt
        self._steps = SlotSteps(model, may_be_compiled)
        self._cache: SlotCache | None = None

    @property
    def compiled(self) -> CompiledSteps | None:
        """See `Steps`."""
        return self._steps.compiled

    def read(self) -> Tensor:
        """See `Steps`."""
        cache = DynamicCache(config=self._model.config.backbone)
        states_BCD = self._prompt.read(self._model, cache)
        self._cache = SlotCache.of(cache, self._prompt.mask_BC)
        return states_BCD[:, -1]

    def advance(self, chunks_AK: Tensor) -> Tensor:
        """See `Steps`."""
        assert self._cache is not None
        return self._steps.advance(chunks_AK, self._cache)

    def keep(self, indices: Sequence[int]) -> None:
        """See `Steps`."""
        assert self._cache is not None
        self._cache = self._cache.select(indices)


class TransformersSteps:
    """Steps through the model's forward pass, with a cache of transformers or none.

    Args:
        model: The model.
        prompt: The prompts.
        num_steps: Maximum number of chunks to generate.
        config: `use_cache`, `cache_implementation` ("dynamic" or "static"), `compile_config` and
            `disable_compile` are used. With a compile config, steps after the prompt run compiled; it needs
            the static cache, whose shapes do not change.

    Raises:
        ValueError: If the cache is of another kind, or a step cannot be compiled with it.
    """

    def __init__(self, model: ChunkModel, prompt: Prompt, num_steps: int, config: GenerationConfig) -> None:
        self._model, self._prompt = model, prompt
        self._pad = model.config.pad_token_id or 0
        self._left_A = torch.arange(len(prompt.ids_BT), device=prompt.ids_BT.device)
        mask_BC = prompt.mask_BC
        self._length = mask_BC.shape[1]
        self._mask_BC = torch.cat([mask_BC, mask_BC.new_ones(len(mask_BC), num_steps - 1)], dim=1)
        self._cache = self._new_cache(config)
        self._position_BC = positions_of(self._mask_BC)
        self._compile_config = _compile_config(config)
        self._seen_BT: Tensor | None = None

    @property
    def compiled(self) -> CompiledSteps | None:
        """See `Steps`: None."""
        return None

    def read(self) -> Tensor:
        """See `Steps`."""
        return self._read(self._prompt.ids_BT)

    def advance(self, chunks_AK: Tensor) -> Tensor:
        """See `Steps`; rows that have been dropped are still read with the others."""
        chunks_BK = chunks_AK.new_full((len(self._mask_BC), chunks_AK.shape[1]), self._pad)
        return self._read(chunks_BK.index_copy(0, self._left_A, chunks_AK))

    def keep(self, indices: Sequence[int]) -> None:
        """See `Steps`."""
        self._left_A = self._left_A[torch.tensor(indices, dtype=torch.long, device=self._left_A.device)]

    def _read(self, tokens_BT: Tensor) -> Tensor:
        """States of the remaining rows, after these tokens of all rows."""
        earlier_BT = self._seen_BT
        if earlier_BT is not None:
            self._length += 1
            if self._cache is None:
                tokens_BT = torch.cat([earlier_BT, tokens_BT], dim=1)
        self._seen_BT = tokens_BT
        size = self._model.config.chunk_size
        num_chunks = tokens_BT.shape[1] // size
        # Copied: the strides of a slice differ from step to step, and each would trigger a recompilation.
        position_BC = self._position_BC[:, self._length - num_chunks : self._length].clone(
            memory_format=torch.contiguous_format
        )
        # A static cache has the same shape at all steps; attention is causal.
        length = None if isinstance(self._cache, StaticCache) else self._length
        forward: Any = None
        if self._compile_config is not None and earlier_BT is not None:
            forward = self._model.get_compiled_call(self._compile_config)
        states_BCD = read_chunks(
            self._model,
            tokens_BT,
            self._mask_BC[:, :length],
            position_BC,
            self._cache,
            forward,
            # Without a cache the prompt is read again at every step.
            may_think=self._prompt.thinks and (earlier_BT is None or self._cache is None),
        )
        return states_BCD[self._left_A, -1]

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
