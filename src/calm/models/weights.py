"""Weight files, which are not trusted: checked before a model is built and again after it is loaded."""

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from calm.errors import InputError, reason_of
from calm.hub.opening import may_run_code, read_settings

_KINDS = (("model", "safetensors"), ("pytorch_model", "bin"))
_REALS = ("F64", "F32", "F16", "BF16")
_NAMES_OF_TORCH = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LEAST_BYTES = 0.1  # Per parameter, in the most tightly packed weights.
_FEW_LAYERS = 100  # They cost nothing to build, and a model with codes has unused ones in its configuration.
_COUNTS_OF_LAYERS = ("num_hidden_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks")


@dataclass(frozen=True)
class TensorInfo:
    """Description of a tensor in a file.

    Args:
        shape: Its shape.
        dtype: Its dtype, as named by safetensors, such as F32.
        file: The file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a folder: safetensors before pickles, a single file before shards.

    Raises:
        InputError: If there are none, one is missing, or an index is damaged or names files elsewhere.
    """
    for stem, suffix in _KINDS:
        index, whole = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _shards_of(index)
    raise InputError(f"there are no weights in '{folder}' (model.safetensors or pytorch_model.bin).")


def _shards_of(index: Path) -> list[Path]:
    names = read_settings(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"'{index}' is damaged (it has no weight_map of names); restore it from a copy.")
    shards = sorted(set(names.values()))
    for name in shards:
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"'{index}' names a file outside its folder ('{name}'); restore it from a copy.")
        if not (index.parent / name).is_file():
            raise InputError(f"'{index}' names '{name}', which is missing; restore it from a copy.")
    return [index.parent / name for name in shards]


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of all tensors in a folder; their values are not read.

    Raises:
        InputError: If there are no weights, or a file is damaged or could run code.
    """
    found: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        with _plain_words(file):
            if file.suffix == ".safetensors":
                found |= _header_of(file)
            else:
                found |= {
                    name: TensorInfo(tuple(tensor.shape), _dtype_name(tensor), file)
                    for name, tensor in _read_pickle(file).items()
                }
    return found


def _header_of(file: Path) -> dict[str, TensorInfo]:
    with safe_open(file, "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: TensorInfo(tuple(one.get_shape()), str(one.get_dtype()), file)
            for name, one in slices.items()
        }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder, on the CPU.

    Raises:
        InputError: As `read_headers`.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with _plain_words(file):
            weights |= load_file(file) if file.suffix == ".safetensors" else _read_pickle(file)
    return weights


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a pickle; torch refuses anything else that a pickle could do."""
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        values = torch.load(file, map_location="cpu", weights_only=True)  # The older format cannot be mapped.
    if not isinstance(values, Mapping) or not all(
        isinstance(name, str) and isinstance(one, Tensor) for name, one in values.items()
    ):
        raise ValueError("it contains something other than tensors")
    return dict(values)


@contextmanager
def _plain_words(file: Path) -> Iterator[None]:
    """Context manager that turns a library's error about an unreadable file into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if may_run_code(error):
            raise InputError(
                f"'{file}' is a pickle that could run code, so it was not loaded; use safetensors instead."
            ) from error
        reason = "it is not a weights file" if isinstance(error, pickle.UnpicklingError) else reason_of(error)
        raise InputError(f"cannot read '{file}': it is truncated or damaged ({reason}).") from error


def check_size(config: PreTrainedConfig, headers: Mapping[str, TensorInfo], where: str) -> None:
    """Check that a configuration does not describe more layers than the files have tensors.

    Raises:
        InputError: If it does.
    """
    for name, value in _counts_in(config.to_dict()):
        if value > max(_FEW_LAYERS, len(headers)):
            raise InputError(
                f"the configuration in '{where}' has {name} = {value:,}, but the weights have only "
                f"{len(headers)} tensors; they do not belong together."
            )


def _counts_in(values: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _counts_in(value)
        elif name in _COUNTS_OF_LAYERS and isinstance(value, int):
            yield name, value


def check_headers(network: nn.Module, headers: Mapping[str, TensorInfo], where: str) -> None:
    """Check that weights fit a network, which may be on the meta device.

    Args:
        network: The network.
        headers: Headers of the weight files.
        where: The folder, for messages.

    Raises:
        InputError: If a tensor has the wrong shape, or is not floating-point where it should be.
    """
    for name, wanted in network.state_dict().items():
        found = headers.get(name)
        if found is None:
            continue
        if found.shape != tuple(wanted.shape):
            raise _of_other_shape(where, name, found.shape, wanted.shape)
        if wanted.is_floating_point() and found.dtype not in _REALS:
            raise InputError(
                f"the weights in '{where}' do not fit their configuration: {name} has dtype "
                f"{found.dtype}, which is not floating point ({', '.join(_REALS)})."
            )


def check_complete(info: Mapping[str, Any], where: str) -> None:
    """Check that a model was loaded with all of its weights.

    Args:
        info: The loading info of transformers.
        where: The folder, for messages.

    Raises:
        InputError: If tensors are missing, or one has the wrong shape.
    """
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"the weights in '{where}' are incomplete: {len(missing)} tensors are missing, "
            f"the first is {missing[0]}."
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise _of_other_shape(where, name, found, wanted)


def _of_other_shape(where: str, name: str, found: Sequence[int], wanted: Sequence[int]) -> InputError:
    return InputError(
        f"the weights in '{where}' do not fit their configuration: {name} has shape {list(found)} instead of "
        f"{list(wanted)}."
    )


def check_parameters(network: nn.Module, headers: Mapping[str, TensorInfo], where: str) -> None:
    """Check that a network on the meta device is not far larger than its weight files.

    Raises:
        InputError: If it is.
    """
    described = sum(weight.numel() for weight in network.parameters())
    there = sum(file.stat().st_size for file in {one.file for one in headers.values()})
    if described * _LEAST_BYTES > there:
        raise InputError(
            f"the configuration in '{where}' describes {described:,} parameters, but the weights have only "
            f"{there:,} bytes; they do not belong together."
        )


def check_finite(network: nn.Module, where: str) -> None:
    """Check that all weights are finite.

    Raises:
        InputError: If one is NaN or infinite.
    """
    for name, weight in network.state_dict().items():
        if weight.is_floating_point() and weight.numel():
            largest = torch.linalg.vector_norm(weight.detach().flatten(), ord=math.inf)
            if not largest.isfinite():
                raise InputError(f"the weights in '{where}' are damaged: {name} holds NaN or infinity.")


def _dtype_name(tensor: Tensor) -> str:
    return _NAMES_OF_TORCH.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
