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
_FLOAT_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_MIN_BYTES = 0.1  # Per parameter, in the most tightly packed weights.
# So many layers are always allowed: they cost nothing to build, and the configuration of a model with codes
# has a few that are not used.
_FEW_LAYERS = 100
_LAYER_COUNTS = ("num_hidden_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks")


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
        file, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if file.is_file():
            return [file]
        if index.is_file():
            return _shards_in(index)
    raise InputError(f"there are no weights in '{folder}' (model.safetensors or pytorch_model.bin).")


def _shards_in(index: Path) -> list[Path]:
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
    headers: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        with _plain_errors(file):
            if file.suffix == ".safetensors":
                headers |= _read_header(file)
            else:
                headers |= {
                    name: TensorInfo(tuple(tensor.shape), _dtype_name(tensor), file)
                    for name, tensor in _read_pickle(file).items()
                }
    return headers


def _read_header(file: Path) -> dict[str, TensorInfo]:
    with safe_open(file, "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: TensorInfo(tuple(tensor.get_shape()), str(tensor.get_dtype()), file)
            for name, tensor in slices.items()
        }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder, on the CPU.

    Raises:
        InputError: As `read_headers`.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with _plain_errors(file):
            weights |= load_file(file) if file.suffix == ".safetensors" else _read_pickle(file)
    return weights


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a pickle; torch refuses anything else that a pickle could do."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        # The older format cannot be mapped.
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError("it contains something other than tensors")
    return dict(tensors)


@contextmanager
def _plain_errors(file: Path) -> Iterator[None]:
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
    for name, value in _layer_counts(config.to_dict()):
        if value > max(_FEW_LAYERS, len(headers)):
            raise InputError(
                f"the configuration in '{where}' has {name} = {value:,}, but the weights have only "
                f"{len(headers)} tensors; they do not belong together."
            )


def _layer_counts(config: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Name and value of every number of layers in a configuration and those nested in it."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _layer_counts(value)
        elif name in _LAYER_COUNTS and isinstance(value, int):
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
    for name, weight in network.state_dict().items():
        header = headers.get(name)
        if header is None:
            continue
        if header.shape != tuple(weight.shape):
            raise _shape_error(where, name, header.shape, weight.shape)
        if weight.is_floating_point() and header.dtype not in _FLOAT_DTYPES.values():
            raise InputError(
                f"the weights in '{where}' do not fit their configuration: {name} has dtype "
                f"{header.dtype}, which is not floating point ({', '.join(_FLOAT_DTYPES.values())})."
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
    for name, actual, expected in sorted(info["mismatched_keys"]):
        raise _shape_error(where, name, actual, expected)


def _shape_error(where: str, name: str, actual: Sequence[int], expected: Sequence[int]) -> InputError:
    return InputError(
        f"the weights in '{where}' do not fit their configuration: {name} has shape {list(actual)} instead "
        f"of {list(expected)}."
    )


def check_parameters(network: nn.Module, headers: Mapping[str, TensorInfo], where: str) -> None:
    """Check that a network on the meta device is not far larger than its weight files.

    Raises:
        InputError: If it is.
    """
    num_parameters = sum(weight.numel() for weight in network.parameters())
    num_bytes = sum(file.stat().st_size for file in {header.file for header in headers.values()})
    if num_parameters * _MIN_BYTES > num_bytes:
        raise InputError(
            f"the configuration in '{where}' describes {num_parameters:,} parameters, but the weights have "
            f"only {num_bytes:,} bytes; they do not belong together."
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
    return _FLOAT_DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
