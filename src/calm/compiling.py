"""A model's generation steps, compiled ahead of time and timed against eager execution."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calm.errors import InputError
from calm.extras import require_compiler
from calm.models.generation.ahead import compile_steps, folder_of_steps

_CHUNKS = 32  # Per timed text.
_ROUNDS = 5  # Timed runs, with and without compiled steps.
MANY = 8
"""Batch size that stands for any number of texts above 1."""


@dataclass(frozen=True)
class GenerationSpeed:
    """Tokens per second of a model at T = 1, or at the temperature that it was compiled for.

    Args:
        rows: Texts at once.
        eager: Without compiled steps.
        compiled: With them.
    """

    rows: int
    eager: float
    compiled: float


def compile_model(
    model: Any,
    rows: Sequence[int] = (1, MANY),
    temperatures: Sequence[float] = (1.0,),
    on_part: Callable[[str], None] = lambda name: None,
) -> tuple[Path, list[GenerationSpeed]]:
    """Compile a model's generation steps, and time generation with and without them in alternation.

    Args:
        model: A `CalmForCausalLM`.
        rows: 1 for a single text, more for any number of them.
        temperatures: Temperatures of the head's draws; 1 unless the head takes one.
        on_part: Called with the name of each part before it is compiled.

    Returns:
        The folder of the compiled steps, and the speed for each of `rows`.

    Raises:
        InputError: If the model cannot be compiled here.
    """
    if model.config.model_type != "calm":
        raise InputError(
            f"only a CALM's steps can be compiled, not those of a {model.config.model_type} model."
        )
    for temperature in temperatures:
        try:
            model.head.check_temperature(temperature)
        except ValueError as error:
            raise InputError(str(error)) from error
    require_compiler("compiling", "generate without compiling")
    try:
        compile_steps(model, rows, temperatures, on_part)
    except ValueError as error:
        raise InputError(str(error)) from error
    return folder_of_steps(model), [_speed(model, batch_size, temperatures[0]) for batch_size in rows]


def _speed(model: Any, rows: int, temperature: float) -> GenerationSpeed:
    size = model.config.chunk_size
    prompt = torch.arange(rows * size).view(rows, size) % model.config.vocab_size

    def seconds(is_eager: bool) -> float:
        start = time.perf_counter()
        text = model.generate(
            prompt,
            temperature=temperature,
            sampler=None if temperature == 1 else "head",
            seed=0,
            max_new_tokens=_CHUNKS * size,
            eos_token_id=[],  # No text ends early.
            disable_compile=is_eager,
        )
        assert text.shape[1] == (_CHUNKS + 1) * size
        return time.perf_counter() - start

    rounds = [(seconds(True), seconds(False)) for _ in range(_ROUNDS + 1)][1:]  # The first is a warm-up.
    eager, compiled = (
        rows * _CHUNKS * size / statistics.median(times) for times in zip(*rounds, strict=True)
    )
    return GenerationSpeed(rows, eager, compiled)
