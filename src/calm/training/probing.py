"""Check that this machine can do what a recipe asks for, before hours of work."""

import os
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from calm.errors import InputError, reason_of
from calm.extras import require_compiler
from calm.models.loading import best_device
from calm.training.recipe import LanguageModelSettings, TrainingSettings

_ALWAYS = ("sdpa", "eager")
_BYTES_OF_A_WEIGHT = 4


def check_compiler(training: TrainingSettings, name: str) -> None:
    """Raise InputError if a stage is to be compiled, but there is no C++ compiler."""
    if training.compile:
        require_compiler(f"{name}.compile", "set it to false")


def check_attention(settings: LanguageModelSettings) -> None:
    """Raise InputError if the attention implementation cannot train a small model on this machine."""
    if settings.attention in _ALWAYS:
        return
    small = settings.as_llama() | {"vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small["attn_implementation"] = settings.attention
    try:
        config = LlamaConfig(**small)
        model: Any = nn.Module.to(LlamaForCausalLM(config), best_device())
        tokens = torch.ones(1, 8, dtype=torch.long, device=model.device)
        is_bf16 = settings.training.precision == "bf16"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=is_bf16):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    except Exception as error:  # Attention packages may raise anything.
        raise InputError(
            f"language_model.attention '{settings.attention}' does not work here ({reason_of(error)}); "
            "set it to sdpa."
        ) from error


def check_memory(network: nn.Module) -> None:
    """Raise InputError if the weights of a network alone exceed the memory of this machine."""
    available = _bytes_of_memory()
    needed = _BYTES_OF_A_WEIGHT * sum(weight.numel() for weight in network.parameters())
    if available is not None and needed > available:
        raise InputError(
            f"the recipe defines a model of {needed // _BYTES_OF_A_WEIGHT:,} parameters, whose weights alone "
            f"need {needed / 1e9:,.0f} GB, but this machine has {available / 1e9:,.0f} GB; make the model "
            "smaller."
        )


def _bytes_of_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Not available on every system.
        return None
