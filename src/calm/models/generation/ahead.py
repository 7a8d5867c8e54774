"""Generation steps compiled ahead of time: once per model and processor, then loaded in milliseconds.

Two functions are compiled, each for a single row and for any number of them: `advance`, one more chunk
through embedding and backbone; and `draw`, through head and decoder. Random numbers are generated outside
and passed in, so a seed gives the same text as without compilation.

Shapes: R rows, K tokens per chunk, N draws, M = N · R, U numbers of a request.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm.core.random import Randomness, Request, numbers_for
from calm.errors import reason_of
from calm.models.generation.compiled_files import (
    digest_of_weights,
    folder_of_kind,
    load_function,
    state_of_weights,
)
from calm.models.generation.lean import can_step
from calm.models.generation.tracing import (
    compile_function,
    function_name,
    functions_to_trace,
    requests_of_draw,
)
from calm.models.heads.contract import raise_not_finite

logger = logging.getLogger(__name__)
_LOGITS_AT_ONCE = 2**24  # Token logits in memory at once: 64 MiB in float32.
_ATTRIBUTE = "_compiled_steps"  # Where `find_steps` caches its result on the model.


@dataclass
class CompiledSteps:
    """The compiled functions of a model.

    Args:
        model: The model.
        functions: The functions, by `function_name`.
    """

    model: Any
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.model.config
        self._draws_at_once = max(1, _LOGITS_AT_ONCE // (config.chunk_size * config.vocab_size))
        self._requests: dict[float, list[Request]] = {}
        self._prepared: tuple[Tensor, Tensor] | None = None

    def advance(self, chunks_RK: Tensor, length_R: Tensor, cache: list[Tensor]) -> Tensor | None:
        """States that predict each row's next chunk, as from `ChunkStep`; None if that is not compiled."""
        function = self.functions.get(function_name("advance", len(chunks_RK)))
        if function is None:
            return None
        states_RD, prepared_R = function(chunks_RK.contiguous(), length_R, *cache)
        self._prepared = states_RD, prepared_R
        return states_RD

    def prepare(self, states_RD: Tensor) -> Tensor:
        """Output of the head's `prepare`; for the states of the last `advance`, it is already computed."""
        if self._prepared is not None and self._prepared[0] is states_RD:
            return self._prepared[1]
        prepared_R: Tensor = self.model.head.prepare(states_RD)
        return prepared_R

    def draw(
        self, prepared_R: Tensor, num_draws: int, randomness: Randomness, temperature: float
    ) -> Tensor | None:
        """Draws of the next chunk, (N, R, K), as from `draw_chunks`; None if that is not compiled."""
        num_rows = len(prepared_R)
        number = num_draws * num_rows
        requests = self._requests_for(number, temperature, prepared_R)
        if requests is None:
            return None
        numbers = numbers_for(requests, num_draws, num_rows, randomness, prepared_R.device)
        if num_draws > 1:
            prepared_R = prepared_R.expand(num_draws, *prepared_R.shape).flatten(0, 1)
            numbers = [numbers_NRU.flatten(0, 1).unsqueeze(0) for numbers_NRU in numbers]
        if number <= self._draws_at_once:
            return self._draw(prepared_R, numbers, temperature).unflatten(0, (num_draws, num_rows))
        parts = [slice(first, first + self._draws_at_once) for first in range(0, number, self._draws_at_once)]
        chunks = [
            self._draw(prepared_R[part], [numbers_1MU[:, part] for numbers_1MU in numbers], temperature)
            for part in parts
        ]
        return torch.cat(chunks).unflatten(0, (num_draws, num_rows))

    def _requests_for(self, number: int, temperature: float, prepared_R: Tensor) -> list[Request] | None:
        """The random numbers that this many draws request; None if the draws are not compiled."""
        # The last of several parts may be a single draw.
        sizes = {min(number, self._draws_at_once), number % self._draws_at_once or self._draws_at_once}
        if any(function_name("draw", size, temperature) not in self.functions for size in sizes):
            return None
        requests = self._requests.get(temperature)
        if requests is None:
            requests = self._requests[temperature] = requests_of_draw(self.model, prepared_R[:1], temperature)
        return requests

    def _draw(self, prepared_M: Tensor, numbers: list[Tensor], temperature: float) -> Tensor:
        function = self.functions[function_name("draw", len(prepared_M), temperature)]
        # Compiled code assumes contiguous strides.
        contiguous = (numbers_1MU.contiguous() for numbers_1MU in numbers)
        chunks_MK, is_finite = function(prepared_M.contiguous(), *contiguous)
        if not bool(is_finite):
            raise_not_finite(prepared_M.dtype)
        return chunks_MK


def find_steps(model: Any) -> CompiledSteps | None:
    """The functions compiled for a model's current weights, by this process or an earlier one, if any."""
    root = folder_of_kind(model)
    if root is None or not root.is_dir():
        return None
    state = root, state_of_weights(model)  # Other settings of the same weights have another root.
    cached_state, steps = getattr(model, _ATTRIBUTE, (None, None))
    if cached_state != state:
        folder = root / digest_of_weights(model)
        functions = _functions_in(folder) if can_step(model) else {}
        steps = CompiledSteps(model, functions) if functions else None
        object.__setattr__(model, _ATTRIBUTE, (state, steps))
    return steps


def forget_steps(model: Any) -> None:
    """Drop what `find_steps` has cached for a model, so that it looks at all weights again."""
    if hasattr(model, _ATTRIBUTE):
        object.__delattr__(model, _ATTRIBUTE)


def compile_steps(
    model: Any,
    rows: Sequence[int] = (1, 2),
    temperatures: Sequence[float] = (1.0,),
    announce: Callable[[str], None] = lambda name: None,
) -> CompiledSteps:
    """Compile what is not compiled yet; each part takes ten to twenty seconds on two cores.

    Args:
        model: A `CalmForCausalLM` on a CPU.
        rows: 1 for a single row, 2 for any larger number of them.
        temperatures: Temperatures of the head's draws; only 1, unless the head takes others.
        announce: Called with the name of each part before it is compiled.

    Raises:
        ValueError: If the model is on another device, has layers other than Llama's, or cannot be traced,
            or if the compiled code disagrees with the model.
    """
    folder = folder_of_steps(model)
    if not can_step(model):
        raise ValueError(
            "only plain Llama layers whose rotary embeddings do not depend on the length can be compiled; "
            "this model's layers have hooks, or are of another type."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for name, build in functions_to_trace(model, rows, temperatures):
            if not (folder / f"{name}.pt2").exists():
                announce(name)
                compile_function(build(), folder / f"{name}.pt2")
    forget_steps(model)
    steps = find_steps(model)
    assert steps is not None
    return steps


def folder_of_steps(model: Any) -> Path:
    """Folder of a model's compiled functions.

    Raises:
        ValueError: If the model is not on a CPU.
    """
    root = folder_of_kind(model, may_create=True)
    if root is None:
        raise ValueError(
            f"steps can only be compiled ahead of time for CPUs, but this model is on {model.device}."
        )
    return root / digest_of_weights(model)


def _functions_in(folder: Path) -> dict[str, Callable[..., Any]]:
    """Compiled functions by name; files that cannot be loaded are removed, and recompiled on request."""
    functions = {}
    for file in sorted(folder.glob("*.pt2")):
        try:
            functions[file.stem] = load_function(file)
        except (RuntimeError, OSError) as error:
            logger.warning("'%s' could not be loaded and was removed (%s).", file, reason_of(error))
            file.unlink(missing_ok=True)
    return functions
