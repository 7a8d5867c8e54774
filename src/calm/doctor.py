"""What CALM would use on this machine, and why."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

from calm.errors import InputError
from calm.extras import require
from calm.hardware import (
    MIXED_PRECISION_PAYS,
    matrix_rate,
    mixed_precision_gain,
    processor_name,
    read_rate,
    thread_gain,
)
from calm.models.loading import best_device, best_dtype

_WIDTH = 512  # Of the timed layers.
_SHARED = 0.6  # Share of the ideal speedup below which cores seem to be shared.
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PACKAGES = ("calm-lm", "torch", "transformers", "tokenizers", "datasets", "accelerate", "pytorch_optimizer")


def examine() -> dict[str, dict[str, str]]:
    """Findings by name, in two groups: "versions" and "hardware"."""
    device = best_device()
    return {
        "versions": {
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            **{name: _version(name) for name in _PACKAGES},
        },
        "hardware": {
            "processor": (
                f"{processor_name()}, {os.cpu_count()} cores seen, "
                f"{torch.get_num_threads()} threads used by torch"
            ),
            "device": _device(device),
            "threads": _threads(),
            "matrices": _matrices(device),
            "memory": f"read at {read_rate(device) / 1e9:,.0f} GB/s, which bounds single-text generation",
            "dtype": _dtype(device),
            "attention": _attention(device),
            "compile": _compile(device),
            "report": _plots(),
        },
    }


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu: no accelerator that torch can use"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        return f"cuda: {torch.cuda.device_count()} x {properties.name}, {memory:.0f} GiB each"
    return f"{device.type}: found by torch.accelerator"


def _threads() -> str:
    number = torch.get_num_threads()
    if number == 1:
        return "1; set OMP_NUM_THREADS for more"
    gain = thread_gain()
    speedup = f"{number} multiply matrices {gain:.1f} times as fast as one"
    if gain > _SHARED * number:
        return speedup
    useful = max(1, round(gain))
    return f"{speedup}: the machine is busy or its cores are shared; try OMP_NUM_THREADS={useful}"


def _matrices(device: torch.device) -> str:
    rates = {name: matrix_rate(device, dtype) for name, dtype in _TYPES.items()}
    known = [f"{name} {rate / 1e9:,.3g} GFLOP/s" for name, rate in rates.items() if rate is not None]
    return ", ".join(known) or "not enough memory to measure"


def _dtype(device: torch.device) -> str:
    if best_dtype(device) is torch.bfloat16:
        return "bfloat16 mixed precision is worthwhile here (training.precision: bf16); weights stay float32"
    if device.type == "cpu":
        gain = mixed_precision_gain(device, _WIDTH)
        precision = "bf16" if gain >= MIXED_PRECISION_PAYS else "fp32"
        return (
            f"layers of width {_WIDTH} train {gain:.1f} times as fast in bfloat16 mixed precision as in "
            f"float32 (training.precision: {precision}, or auto)"
        )
    return "float32: this device does not compute in bfloat16"


def _attention(device: torch.device) -> str:
    choices = ["sdpa"]
    if is_flash_attn_2_available():
        choices.append("flash_attention_2")
    if device.type == "cuda" and is_torch_flex_attn_available():
        choices.append("flex_attention")
    return f"sdpa (the default); usable here: {', '.join(choices)} (language_model.attention)"


def _compile(device: torch.device) -> str:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "not usable: triton is missing"
    return "torch.compile is off unless training.compile is true"


def _plots() -> str:
    try:
        require("the report", "matplotlib")
    except InputError as error:
        return f"no plots: {error}"
    return "plots can be drawn"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
