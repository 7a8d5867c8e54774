"""What CALM would use on this machine, and why."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

from calm.errors import InputError
from calm.extras import require
from calm.hardware import processor_name
from calm.models.loading import best_device, best_dtype

_PACKAGES = ("calm-lm", "torch", "transformers", "tokenizers", "datasets", "accelerate", "pytorch_optimizer")


def examine() -> dict[str, dict[str, str]]:
    """What was found, by name, in two groups: "versions" and "hardware"."""
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


def _dtype(device: torch.device) -> str:
    if best_dtype(device) is torch.bfloat16:
        return "bfloat16 mixed precision pays here (training.precision: bf16); weights stay float32"
    if device.type == "cpu":
        return "float32: bfloat16 saves memory but no time on most processors"
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
