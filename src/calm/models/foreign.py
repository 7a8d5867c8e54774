"""Checks of third-party configurations of Llama-style models, whose files are not trusted.

They run before a network is built, because its size is whatever the file says.
"""

from typing import cast

import torch
from transformers import LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from calm.errors import shown
from calm.models.fields import RANGES, check_heads, check_switches
from calm.models.hyperparameters import LAYERS
from calm.models.token_layers import LIKE_LLAMA

_FLOATS = ("rms_norm_eps", "initializer_range", "attention_dropout")
_OPTIONAL = ("head_dim", "num_key_value_heads")  # Derived from others if missing.
_NUM_LAYERS = "num_hidden_layers"


def check_transformer(config: PreTrainedConfig) -> None:
    """Raise ValueError if a field of a token-level Transformer has the wrong type or is out of range.

    Args:
        config: Its configuration. If the layers are not Llama-style, only their number is checked.
    """
    if config.model_type not in LIKE_LLAMA:
        if (num_layers := getattr(config.get_text_config(), _NUM_LAYERS, None)) is not None:
            _check_number(_NUM_LAYERS, num_layers)
        return
    for name in RANGES["llama"]:
        value = getattr(config, name, None)
        if value is None and name in _OPTIONAL:
            continue
        _check_number(name, value)
    check_heads(config)
    check_switches(vars(config))
    check_functions(config)


def check_functions(config: PreTrainedConfig) -> None:
    """Raise ValueError if transformers does not know the activation or the rotary parameters.

    Args:
        config: A configuration of Llama-style layers.
    """
    activation = config.hidden_act
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise ValueError(
            f"hidden_act must name a transformers activation, such as silu, got {shown(activation)}."
        )
    try:
        with torch.device("meta"):
            LlamaRotaryEmbedding(cast(LlamaConfig, config))
    except Exception as error:  # Each RoPE type raises its own.
        raise ValueError(
            "rope_parameters must be rotary settings that transformers supports, got "
            f"{shown(config.rope_parameters)}."
        ) from error


def _check_number(name: str, value: object) -> None:
    types, expected = ((int, float), "a number") if name in _FLOATS else ((int,), "a whole number")
    if isinstance(value, bool) or not isinstance(value, types):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}.")
    RANGES["llama"].get(name, LAYERS).check(name, value)
