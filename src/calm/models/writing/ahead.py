"""Steps of writing compiled ahead of time: once for a model on a processor, then loaded in milliseconds.

Two functions are compiled, each for a single row and for any number: `advance`, a chunk further through
embedding and backbone; and `draw`, through head and decoder. Random numbers are drawn
outside and handed in, so a seed gives the text that it gives without. What was compiled is native code with the
weights packed inside, and is kept in the user's cache under a name made of all that it depends on.

Shapes: R rows, K tokens per chunk, N draws, M = N · R, U numbers of a request.
"""

import functools
import hashlib
import importlib.resources
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calm.core.random import GivenNumbers, NotedRequests, Randomness, Request, numbers_for
from calm.models.heads.contract import refuse_damaged, traced_checks
from calm.models.writing.lean import ChunkStep, can_step

_SCORES_AT_ONCE = 2**24  # Draws whose token scores are held at once: 64 MiB in float32.
_MOST_ROWS = 2**16
_WORDS = 1024  # Of 8 bytes, in a row of a digest.
_ATTRIBUTE = "_compiled_steps"  # Where a model keeps what was found for it.


@dataclass
class CompiledSteps:
    """What has been compiled of a model.

    Args:
        model: The model.
        functions: By name, as of `_name`.
    """

    model: Any
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.model.config
        self._at_once = max(1, _SCORES_AT_ONCE // (config.chunk_size * config.vocab_size))
        self._requests: dict[float, list[Request]] = {}
        self._prepared: tuple[Tensor, Tensor] | None = None

    def advance(self, chunks_RK: Tensor, length_R: Tensor, cache: list[Tensor]) -> Tensor | None:
        """States that predict the next chunk of each row, as of `ChunkStep`; None if that is not compiled."""
        function = self.functions.get(_name("advance", len(chunks_RK)))
        if function is None:
            return None
        states_RD, prepared_R = function(chunks_RK, length_R, *cache)
        self._prepared = states_RD, prepared_R
        return states_RD

    def prepare(self, states_RD: Tensor) -> Tensor:
        """What the head prepares for some states; for those of the last `advance` that is done already."""
        if self._prepared is not None and self._prepared[0] is states_RD:
            return self._prepared[1]
        prepared_R: Tensor = self.model.head.prepare(states_RD)
        return prepared_R

    def draw(
        self, prepared_R: Tensor, num_draws: int, randomness: Randomness, temperature: float
    ) -> Tensor | None:
        """Draws of the next chunk, (N, R, K), as of the head's `draw_chunks`; None if that is not compiled."""
        num_rows = len(prepared_R)
        number = num_draws * num_rows
        # The last part of many may be a single one.
        sizes = {min(number, self._at_once), number % self._at_once or self._at_once}
        if any(_name("draw", size, temperature) not in self.functions for size in sizes):
            return None
        requests = self._requests.get(temperature)
        if requests is None:
            requests = self._requests[temperature] = requests_of_draw(self.model, prepared_R[:1], temperature)
        numbers = numbers_for(requests, num_draws, num_rows, randomness, prepared_R.device)
        if num_draws > 1:
            prepared_R = prepared_R.expand(num_draws, *prepared_R.shape).flatten(0, 1)
            numbers = [numbers_NRU.flatten(0, 1).unsqueeze(0) for numbers_NRU in numbers]
        chunks_MK = torch.cat(
            [
                self._draw(prepared_R[part], [one[:, part] for one in numbers], temperature)
                for part in (slice(first, first + self._at_once) for first in range(0, number, self._at_once))
            ]
        )
        return chunks_MK.unflatten(0, (num_draws, num_rows))

    def _draw(self, prepared_M: Tensor, numbers_1MU: list[Tensor], temperature: float) -> Tensor:
        function = self.functions[_name("draw", len(prepared_M), temperature)]
        chunks_MK, is_finite = function(prepared_M, *numbers_1MU)
        if not bool(is_finite):
            refuse_damaged(prepared_M.dtype)
        return chunks_MK


def find_steps(model: Any) -> CompiledSteps | None:
    """What has been compiled of a model as it is now, here or in an earlier process; None if nothing was."""
    root = _cache_of_kind(model)
    if root is None or not root.is_dir():
        return None
    state = tuple((weight.data_ptr(), weight._version) for weight in _weights(model))
    seen, steps = getattr(model, _ATTRIBUTE, (None, None))
    if seen != state:
        folder = root / _digest_of_weights(model)
        files = sorted(folder.glob("*.pt2")) if can_step(model) else []
        steps = CompiledSteps(model, {file.stem: _load(file) for file in files}) if files else None
        object.__setattr__(model, _ATTRIBUTE, (state, steps))
    return steps


def compile_steps(
    model: Any,
    rows: Sequence[int] = (1, 2),
    temperatures: Sequence[float] = (1.0,),
    tell: Callable[[str], None] = lambda name: None,
) -> CompiledSteps:
    """Compile what has not been compiled yet; each part takes ten to twenty seconds on two cores.

    Args:
        model: A `CalmForCausalLM` on a processor.
        rows: 1 for a single row, 2 for any larger number of them.
        temperatures: Of the head's draws; 1 but for heads that take one.
        tell: Called with the name of each part before it is compiled.

    Raises:
        ValueError: If the model is on another device, is not made of Llama's layers, or cannot be traced, if a
            compiler is missing, or if what was compiled is not what the model says.
    """
    root = _cache_of_kind(model, anew=True)
    if root is None:
        raise ValueError(
            f"steps are compiled ahead of time for processors, and this model is on {model.device}."
        )
    if not can_step(model):
        raise ValueError(
            "steps are compiled for plain Llama layers with rotations that do not depend on the length; this "
            "model's have hooks, or are of another kind."
        )
    folder = root / _digest_of_weights(model)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for name, build in _parts(model, rows, temperatures):
            if not (folder / f"{name}.pt2").exists():
                tell(name)
                _compile(build(), folder / f"{name}.pt2")
    if hasattr(model, _ATTRIBUTE):
        object.__delattr__(model, _ATTRIBUTE)
    steps = find_steps(model)
    assert steps is not None
    return steps


def requests_of_draw(model: Any, prepared_1: Tensor, temperature: float) -> list[Request]:
    """The random numbers that a draw of the model's head asks for."""
    noted = NotedRequests()
    state = torch.get_rng_state()
    model.head.draw_chunks(prepared_1, 1, noted, temperature)
    torch.set_rng_state(state)
    return noted.requests


# What is traced.


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
            given = GivenNumbers(numbers_1MU)
            chunks_1MK = self.model.head.draw_chunks(prepared_M, 1, given, self.temperature)
        is_finite = torch.stack(checks).all() if checks else torch.ones((), dtype=torch.bool)
        return chunks_1MK[0], is_finite


@dataclass
class _Traced:
    """A function to compile.

    Args:
        module: What it does.
        arguments: An example, tensors.
        dynamic: Which axes of the arguments may have any length.
        is_small: Whether it is for a single row, where reading weights takes all the time.
    """

    module: nn.Module
    arguments: tuple[Tensor, ...]
    dynamic: tuple[Any, ...]
    is_small: bool


def _parts(
    model: Any, rows: Sequence[int], temperatures: Sequence[float]
) -> Iterator[tuple[str, Callable[[], _Traced]]]:
    for number in rows:
        yield _name("advance", number), lambda number=number: _advance(model, number)
        for temperature in temperatures:
            yield (
                _name("draw", number, temperature),
                lambda number=number, temperature=temperature: _draw(model, number, temperature),
            )


def _advance(model: Any, rows: int) -> _Traced:
    number, backbone = 1 if rows == 1 else 8, model.backbone
    attention = backbone.layers[0].self_attn
    heads, dtype = model.config.backbone.num_key_value_heads, backbone.embed_tokens.weight.dtype
    chunks_RK = torch.arange(number * model.config.chunk_size).view(number, -1) % model.config.vocab_size
    length_R = torch.arange(number) + 3
    cache = [
        torch.randn(32, number, heads, attention.head_dim).to(dtype) for _ in range(2 * len(backbone.layers))
    ]
    of_rows = {} if rows == 1 else {0: torch.export.Dim("rows", min=2, max=_MOST_ROWS)}
    of_cache = {0: torch.export.Dim("chunks", min=2, max=2**24)} | {1: one for one in of_rows.values()}
    return _Traced(
        _Advance(model), (chunks_RK, length_R, *cache), (of_rows, of_rows, (of_cache,) * len(cache)), rows == 1
    )


def _draw(model: Any, rows: int, temperature: float) -> _Traced:
    number = 1 if rows == 1 else 8
    like = model.backbone.embed_tokens.weight
    prepared_M = model.head.prepare(torch.randn(number, model.config.state_size).to(like.dtype))
    requests = requests_of_draw(model, prepared_M[:1], temperature)
    numbers = numbers_for(requests, 1, number, None)
    axis = None if rows == 1 else torch.export.Dim("rows", min=2, max=_MOST_ROWS)
    of_rows = {} if axis is None else {0: axis}
    of_numbers = {} if axis is None else {1: axis}
    return _Traced(
        _Draw(model, temperature), (prepared_M, *numbers), (of_rows, (of_numbers,) * len(numbers)), rows == 1
    )


def _compile(traced: _Traced, file: Path) -> None:
    """Compile a function into a file, which is written whole, and see that it says what the module says."""
    from torch._inductor import aoti_compile_and_package

    options: dict[str, Any] = {"freezing": True, "cpp.enable_concat_linear": True}
    if traced.is_small:  # Loops of its own read weights several times faster than a library's products.
        options |= {"max_autotune": True, "max_autotune_gemm_backends": "CPP"}
    partial = file.with_suffix(f".{os.getpid()}.pt2")
    try:
        program = torch.export.export(traced.module, traced.arguments, dynamic_shapes=traced.dynamic)
        _refuse_randomness(program)
        aoti_compile_and_package(program, package_path=str(partial), inductor_configs=options)
        _check_same(traced, _load(partial))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_randomness(program: torch.export.ExportedProgram) -> None:
    for node in program.graph.nodes:
        is_seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if is_seeded and "dot_product" not in str(node.target):  # Attention has the tag for its dropout.
            raise ValueError(
                f"a draw that makes random numbers of its own ({node.target}) cannot be compiled: its head has "
                "to ask calm.core.random for them."
            )


def _check_same(traced: _Traced, compiled: Callable[..., Any]) -> None:
    results = []
    for function in (traced.module, compiled):
        copies = [argument.clone() for argument in traced.arguments]  # A cache is written into.
        results.append([*function(*copies), *copies])
    for one, other in zip(*results, strict=True):
        if one.is_floating_point() and not torch.allclose(one, other, rtol=1e-2, atol=1e-2):
            raise ValueError(
                "the compiled step is not what the model says (largest difference "
                f"{float((one - other).abs().max()):g}); this version of torch compiles it wrongly."
            )


# Where it is kept.


def _name(part: str, rows: int, temperature: float | None = None) -> str:
    suffix = "" if temperature is None else f"-{temperature:g}"
    return f"{part}-{'one' if rows == 1 else 'many'}{suffix}"


def _cache_of_kind(model: Any, anew: bool = False) -> Path | None:
    """The folder of all models of the same configuration on this processor; None where there can be none."""
    if model.device.type != "cpu" or not (anew or cache_root().is_dir()):
        return None
    kind = (
        model.config.to_json_string(use_diff=False),
        str(model.backbone.embed_tokens.weight.dtype),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        _digest_of_code(type(model.head)),
    )
    return cache_root() / hashlib.blake2b(repr(kind).encode(), digest_size=12).hexdigest()


def cache_root() -> Path:
    """Where compiled steps are kept: in `CALM_CACHE`, or the user's cache."""
    if chosen := os.environ.get("CALM_CACHE"):
        return Path(chosen).expanduser() / "compiled"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "calm" / "compiled"


def _load(file: Path) -> Callable[..., Any]:
    """A compiled function of tensors. What torch puts around it takes as long as a small model's step."""
    from torch._inductor import aoti_load_package

    loader = aoti_load_package(str(file)).loader

    def call(*tensors: Tensor) -> list[Tensor]:
        results: list[Tensor] = loader.boxed_run(list(tensors))
        return results

    return call


def _weights(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _digest_of_weights(model: Any) -> str:
    """A name for the values of all weights, at the speed of memory: rows of words times random numbers."""
    digest = hashlib.blake2b(digest_size=12)
    generator = torch.Generator().manual_seed(0)
    factor_W = torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator) * 2 + 1
    for weight in _weights(model):
        digest.update(repr((tuple(weight.shape), weight.dtype)).encode())
        octets = weight.detach().contiguous().flatten().view(torch.uint8)
        whole = len(octets) // (8 * _WORDS) * (8 * _WORDS)
        words_LW = octets[:whole].clone().view(torch.int64).view(-1, _WORDS)
        digest.update((words_LW * factor_W).sum(-1).numpy().tobytes())
        digest.update(octets[whole:].numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def _digest_of_code(head: type) -> str:
    """A name for the code that is compiled: all of `calm.core` and `calm.models`, and an outside head's."""
    package = Path(str(importlib.resources.files("calm")))
    files = sorted([*(package / "core").rglob("*.py"), *(package / "models").rglob("*.py")])
    digest = hashlib.blake2b(digest_size=12)
    for file in [*files, *filter(None, [inspect.getsourcefile(head)])]:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()
