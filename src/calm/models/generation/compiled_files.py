"""Where compiled functions are kept: in the user's cache, under a hash of all that they depend on."""

import functools
import hashlib
import importlib.resources
import inspect
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_UNUSED_BY_LAYERS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "transformers_version",
    "_name_or_path",
    "architectures",
}
_WORDS = 1024  # Words of 8 bytes per row, for digests of weights.
_BYTES_SAMPLED = 64  # Bytes per tensor that are compared between calls.


def folder_of_kind(model: Any, may_create: bool = False) -> Path | None:
    """The folder for all models of the same configuration on this processor.

    None if the model is not on a CPU, or there is no cache yet and none may be created.
    """
    if model.device.type != "cpu" or not (may_create or cache_root().is_dir()):
        return None
    key = (
        json.dumps(_layer_settings(model.config.to_dict()), sort_keys=True, default=str),
        str(model.backbone.embed_tokens.weight.dtype),
        torch.__version__,
        _digest_of_processor(),
        torch.get_num_threads(),
        _digest_of_code(inspect.getsourcefile(type(model.head))),
    )
    return cache_root() / hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()


def _layer_settings(settings: Any) -> Any:
    """A model's settings without those that no layer uses."""
    if not isinstance(settings, dict):
        return settings
    return {name: _layer_settings(value) for name, value in settings.items() if name not in _UNUSED_BY_LAYERS}


def cache_root() -> Path:
    """The folder of compiled steps: in `CALM_CACHE`, or the user's cache."""
    if chosen := os.environ.get("CALM_CACHE"):
        return Path(chosen).expanduser() / "compiled"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "calm" / "compiled"


def load_function(file: Path) -> Callable[..., Any]:
    """Load a compiled function of tensors.

    It is called without torch's wrapper, which takes as long as a small model's step.
    """
    loader = _loader_of(str(file))

    def call(*tensors: Tensor) -> list[Tensor]:
        results: list[Tensor] = loader.boxed_run(list(tensors))
        return results

    return call


def _loader_of(file: str) -> Any:
    """The loader from `torch._inductor.aoti_load_package`, without importing that, which takes a second."""
    try:
        return torch._C._aoti.AOTIModelPackageLoader(file, "model", False, 1, -1)
    except (AttributeError, TypeError):  # Another release of torch.
        from torch._inductor import aoti_load_package  # noqa: PLC0415 (slow)

        return aoti_load_package(file).loader


def weights_of(model: Any) -> list[Tensor]:
    """All tensors that a model's text depends on."""
    return [*model.parameters(), *model.buffers()]


def digest_of_weights(model: Any) -> str:
    """Hash all weights, at the speed of memory: sums of rows of words times random factors."""
    digest = hashlib.blake2b(digest_size=12)
    generator = torch.Generator().manual_seed(0)
    factor_W = torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator) * 2 + 1
    for weight in weights_of(model):
        digest.update(repr((tuple(weight.shape), weight.dtype)).encode())
        octets = _bytes_of(weight)
        end = len(octets) // (8 * _WORDS) * (8 * _WORDS)  # Of the last complete row of words.
        words_LW = octets[:end].clone().view(torch.int64).view(-1, _WORDS)
        digest.update((words_LW * factor_W).sum(-1).numpy().tobytes())
        digest.update(octets[end:].numpy().tobytes())
    return digest.hexdigest()


def state_of_weights(model: Any) -> tuple[Any, ...]:
    """A value that changes when the weights do: torch's version counters and a sample of the bytes.

    The counters miss changes through `.data`, by which peft merges adapters.
    """
    weights = weights_of(model)
    versions = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
    # An odd stride, so that the sample includes every byte of a number.
    sample = torch.cat([octets[:: len(octets) // _BYTES_SAMPLED | 1] for octets in map(_bytes_of, weights)])
    return *versions, sample.numpy().tobytes()


def _bytes_of(weight: Tensor) -> Tensor:
    return weight.detach().contiguous().flatten().view(torch.uint8)


@functools.cache
def _digest_of_code(head_file: str | None) -> str:
    """Hash the code that is compiled: all of `calm.core` and `calm.models`, and the head's own file."""
    package = Path(str(importlib.resources.files("calm")))
    files = sorted([*(package / "core").rglob("*.py"), *(package / "models").rglob("*.py")])
    digest = hashlib.blake2b(digest_size=12)
    for file in [*files, *([Path(head_file)] if head_file else [])]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _digest_of_processor() -> str:
    """Hash the processor's features: machines that share a home may run each other's code badly."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    details = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    capability = torch.backends.cpu.get_cpu_capability()
    features = (platform.machine(), platform.processor(), capability, sorted(details))
    return hashlib.blake2b(repr(features).encode(), digest_size=12).hexdigest()
