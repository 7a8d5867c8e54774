"""Tracing the generation functions, and compiling them into native code with the weights packed inside.

Shapes: R rows, K tokens per chunk, M draws, U numbers of a request.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calm.core.random import PredrawnNumbers, Request, RequestRecorder, numbers_for
from calm.errors import reason_of
from calm.models.generation.compiled_files import load_function
from calm.models.generation.lean import ChunkStep
from calm.models.heads.contract import traced_checks

_ROWS = torch.export.Dim("rows", min=2, max=2**16)
_CHUNKS = torch.export.Dim("chunks", min=2, max=2**24)
_SOME_ROWS = 8  # In the example input for many rows.
_TOLERANCE = 1e-2  # For compiled code: a wrong loop is further off than this, bfloat16 rounding is not.


def function_name(part: str, rows: int, temperature: float | None = None) -> str:
    """The name of a function, "advance" or "draw", for one row or many."""
    suffix = "" if temperature is None else f"-{temperature:g}"
    return f"{part}-{'one' if rows == 1 else 'many'}{suffix}"


def requests_of_draw(model: Any, prepared_1: Tensor, temperature: float) -> list[Request]:
    """The random numbers that a draw from the model's head requests."""
    recorder = RequestRecorder()
    state = torch.get_rng_state()
    model.head.draw_chunks(prepared_1, 1, recorder, temperature)
    torch.set_rng_state(state)
    return recorder.requests


class _Advance(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.step = ChunkStep(model)

    def forward(self, chunks_RK: Tensor, length_R: Tensor, *cache: Tensor) -> tuple[Tensor, Tensor]:
        states_RD = self.step(chunks_RK, length_R, cache)
        return states_RD, self.step.model.head.prepare(states_RD)


class _Draw(nn.Module):
    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, prepared_M: Tensor, *numbers_1MU: Tensor) -> tuple[Tensor, Tensor]:
        with traced_checks() as checks:
            given = PredrawnNumbers(numbers_1MU)
            chunks_1MK = self.model.head.draw_chunks(prepared_M, 1, given, self.temperature)
        is_finite = torch.stack(checks).all() if checks else torch.ones((), dtype=torch.bool)
        return chunks_1MK[0], is_finite


@dataclass(frozen=True)
class Traced:
    """A function to compile.

    Args:
        module: The function.
        arguments: Example tensors.
        dynamic: Which axes of the arguments may have any length.
        is_small: Whether it is for a single row, where nearly all the time goes into reading weights.
    """

    module: nn.Module
    arguments: tuple[Tensor, ...]
    dynamic: tuple[Any, ...]
    is_small: bool


def functions_to_trace(
    model: Any, rows: Sequence[int], temperatures: Sequence[float]
) -> Iterator[tuple[str, Callable[[], Traced]]]:
    """Names of functions, each with a callable that prepares it for compilation.

    Args:
        model: The model.
        rows: 1 for a single row, more for any number of them.
        temperatures: Temperatures of draws.
    """
    for num_rows in rows:
        yield function_name("advance", num_rows), partial(_advance, model, num_rows)
        for temperature in temperatures:
            name = function_name("draw", num_rows, temperature)
            yield name, partial(_draw, model, num_rows, temperature)


def _advance(model: Any, rows: int) -> Traced:
    num_rows, backbone = 1 if rows == 1 else _SOME_ROWS, model.backbone
    attention = backbone.layers[0].self_attn
    heads, dtype = model.config.backbone.num_key_value_heads, backbone.embed_tokens.weight.dtype
    chunks_RK = torch.arange(num_rows * model.config.chunk_size).view(num_rows, -1) % model.config.vocab_size
    length_R = torch.arange(num_rows) + 3
    cache = [
        torch.randn(num_rows, heads, 32, attention.head_dim).to(dtype)
        for _ in range(2 * len(backbone.layers))
    ]
    row_dims = {} if rows == 1 else {0: _ROWS}
    cache_dims = {2: _CHUNKS} if rows == 1 else {0: _ROWS, 2: _CHUNKS}
    dynamic = (row_dims, row_dims, (cache_dims,) * len(cache))
    return Traced(_Advance(model), (chunks_RK, length_R, *cache), dynamic, is_small=rows == 1)


def _draw(model: Any, rows: int, temperature: float) -> Traced:
    num_rows, dtype = 1 if rows == 1 else _SOME_ROWS, model.backbone.embed_tokens.weight.dtype
    prepared_M = model.head.prepare(torch.randn(num_rows, model.config.state_size).to(dtype))
    numbers = numbers_for(requests_of_draw(model, prepared_M[:1], temperature), 1, num_rows, None)
    row_dims, number_dims = ({}, {}) if rows == 1 else ({0: _ROWS}, {1: _ROWS})
    dynamic = (row_dims, (number_dims,) * len(numbers))
    return Traced(_Draw(model, temperature), (prepared_M, *numbers), dynamic, is_small=rows == 1)


def compile_function(traced: Traced, file: Path) -> None:
    """Compile a function into a file, which is written atomically.

    Raises:
        ValueError: If it cannot be traced or compiled, generates random numbers itself, or disagrees with the
            model once it is compiled.
    """
    from torch._inductor import aoti_compile_and_package  # noqa: PLC0415 (it loads a compiler)

    options: dict[str, Any] = {"freezing": True, "cpp.enable_concat_linear": True}
    if traced.is_small:  # Generated loops read weights several times faster than a library's matmuls.
        options |= {"max_autotune": True, "max_autotune_gemm_backends": "CPP"}
    unfinished = file.with_suffix(f".{os.getpid()}.pt2")
    try:
        program = _exported(traced)
        _refuse_randomness(program)
        try:
            aoti_compile_and_package(program, package_path=str(unfinished), inductor_configs=options)
        except Exception as error:  # From the compiler, or from torch before it.
            raise ValueError(
                f"torch {torch.__version__} cannot compile the step ({reason_of(error)})."
            ) from error
        _check_same(traced, load_function(unfinished))
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _exported(traced: Traced) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(traced.module, traced.arguments, dynamic_shapes=traced.dynamic)
    except Exception as error:  # Traced code may fail in any way.
        raise ValueError(
            f"a step cannot be traced ({reason_of(error)}); a custom head must not branch on tensor "
            "values, and must take the number of its rows from prepared_P.shape[0], not from len()."
        ) from error


def _refuse_randomness(program: torch.export.ExportedProgram) -> None:
    for node in program.graph.nodes:
        is_seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if is_seeded and "dot_product" not in str(node.target):  # Attention has the tag for its dropout.
            raise ValueError(
                f"a draw that generates its own random numbers ({node.target}) cannot be compiled: its head "
                "must get them from calm.core.random."
            )


def _check_same(traced: Traced, compiled: Callable[..., Any]) -> None:
    results = []
    for function in (traced.module, compiled):
        copies = [argument.clone() for argument in traced.arguments]  # Caches are written in place.
        results.append([*function(*copies), *copies])
    for expected, actual in zip(*results, strict=True):
        if expected.is_floating_point() and not torch.allclose(
            expected, actual, rtol=_TOLERANCE, atol=_TOLERANCE
        ):
            raise ValueError(
                "the compiled step disagrees with the model (largest difference "
                f"{float((expected - actual).abs().max()):g}); this version of torch miscompiles it."
            )
