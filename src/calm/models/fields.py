"""Allowed values of configuration fields: configuration files are not trusted."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, get_origin

from transformers import PreTrainedConfig

from calm.errors import shown
from calm.models.hyperparameters import (
    ABOVE_ZERO,
    AUTOENCODER_RANGES,
    DECODER_RANGES,
    INPUT_RANGES,
    SHARES_BELOW_ONE,
    SIZES,
)
from calm.ranges import Range

VOCABULARY = Range(1, 10**7)
_NUM_BLOCKS = Range(0, 10_000)  # An autoencoder of codes has none.
# Fields shared with recipes have the same range there.
RANGES: dict[str, dict[str, Range]] = {
    "calm_autoencoder": {
        **AUTOENCODER_RANGES,
        "vocab_size": VOCABULARY,
        "chunk_size": Range(1, 1024),
        "num_encoder_layers": _NUM_BLOCKS,
        "num_decoder_layers": _NUM_BLOCKS,
        "dropped_token_id": Range(0),
        "rms_norm_eps": ABOVE_ZERO,
        "initializer_range": Range(0),
    },
    "calm": {
        **INPUT_RANGES,
        "initializer_range": Range(0),
        "layer_norm_eps": ABOVE_ZERO,
    },
    "llama": {
        "vocab_size": VOCABULARY,
        "hidden_size": DECODER_RANGES["hidden_size"],
        "intermediate_size": DECODER_RANGES["intermediate_size"],
        "num_hidden_layers": DECODER_RANGES["num_layers"],
        "num_attention_heads": DECODER_RANGES["num_heads"],
        "num_key_value_heads": DECODER_RANGES["num_key_value_heads"],
        "head_dim": SIZES,
        "max_position_embeddings": DECODER_RANGES["max_chunks"],
        "rms_norm_eps": ABOVE_ZERO,
        "initializer_range": Range(0),
        "attention_dropout": SHARES_BELOW_ONE,
    },
}
_SWITCHES = (  # Boolean fields that transformers' models read at run time.
    "output_hidden_states", "output_attentions", "return_dict", "use_cache", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "is_encoder_decoder", "torchscript", "do_sample", "output_scores",
    "output_logits", "return_dict_in_generate", "use_qk_norm",
)  # fmt: skip
_GENERATION_RANGES = {
    "temperature": Range(0),
    "top_k": Range(0, 10**9),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "typical_p": Range(0, 1),
    "epsilon_cutoff": Range(0, 1),
    "eta_cutoff": Range(0, 1),
    "repetition_penalty": ABOVE_ZERO,
    "length_penalty": Range(-1e6, 1e6),
    "max_length": Range(0, 10**12),
    "max_new_tokens": Range(0, 10**12),
    "min_length": Range(0, 10**12),
    "min_new_tokens": Range(0, 10**12),
    "num_beams": Range(1, 10**4),
    "num_return_sequences": Range(1, 10**4),
    "no_repeat_ngram_size": Range(0, 10**6),
}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "dropped_token_id")


def check_fields(config: PreTrainedConfig, vocab_size: int | None = None) -> None:
    """Raise ValueError if a field has the wrong type, is out of range, or is not a valid token id.

    Args:
        config: A configuration of a CALM, an autoencoder or a Llama.
        vocab_size: Number of token ids; the configuration's own if None.
    """
    types: dict[Any, tuple[Any, str]] = {
        int: (int, "a whole number"), float: (int | float, "a number"), str: (str, "a string"),
    }  # fmt: skip
    for name, hint in declared_fields(type(config)).items():
        allowed_type, expected = types.get(str if get_origin(hint) is Literal else hint, (object, ""))
        value = getattr(config, name)
        if not isinstance(value, allowed_type) or (allowed_type is not object and isinstance(value, bool)):
            raise ValueError(f"{name} must be {expected}, got {shown(value)}.")
    for name, allowed in RANGES.get(config.model_type, {}).items():
        value = getattr(config, name, None)
        if value is not None:
            allowed.check(name, value)
    check_switches(vars(config))
    check_tokens(vars(config), getattr(config, "vocab_size", None) if vocab_size is None else vocab_size)


def check_generation(settings: Mapping[str, Any], vocab_size: int | None) -> None:
    """Raise ValueError if a generation setting has the wrong type or range, or is an invalid token id.

    Args:
        settings: The model's default generation settings, read from its folder.
        vocab_size: Number of token ids of the model; None if ids may exceed it, as in third-party models.
    """
    check_tokens(settings, vocab_size)
    for name, allowed in _GENERATION_RANGES.items():
        value = settings.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, got {shown(value)}.")
        allowed.check(name, value)
    check_switches(settings)


def check_switches(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a boolean field is set to something other than true or false."""
    for name in _SWITCHES:
        if not isinstance(settings.get(name), bool | None):
            raise ValueError(f"{name} must be true or false, got {shown(settings[name])}.")


def check_tokens(settings: Mapping[str, Any], vocab_size: int | None) -> None:
    """Raise ValueError if a special token is not one of `vocab_size` token ids; None allows any id."""
    for name in _TOKENS:
        value = settings.get(name)
        if value is None:
            continue
        for token in value if isinstance(value, list) else [value]:
            is_integer = isinstance(token, int) and not isinstance(token, bool)
            if not (is_integer and 0 <= token < (2**31 if vocab_size is None else vocab_size)):
                between = "" if vocab_size is None else f" between 0 and {vocab_size - 1}"
                raise ValueError(f"{name} must be a token id{between}, got {shown(token)}.")


def check_heads(config: PreTrainedConfig) -> None:
    """Raise ValueError if a Llama's numbers of heads, head size or rotary settings are invalid."""
    num_heads = config.num_attention_heads
    num_kv_heads = config.num_key_value_heads or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads {num_kv_heads}, got {num_heads}."
        )
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}.")
    rope = config.rope_parameters or {}
    for name in ("rope_theta", "factor"):
        if (value := rope.get(name)) is not None:
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, got {shown(value)}.")
            ABOVE_ZERO.check(name, value)


def check_names(
    kind: type[PreTrainedConfig], names: Iterable[str], where: str = "", properties: Iterable[str] = ()
) -> None:
    """Raise ValueError for a name that looks like a misspelt field.

    Other unknown names pass: transformers keeps them, and so do saved configurations.

    Args:
        kind: Class of the configuration.
        names: Names that it is given.
        where: What has the fields, for the message; the class when empty.
        properties: Other names that the configuration knows.
    """
    field_names = [field.name for field in fields(kind)]
    known = {*field_names, *properties, *vars(PreTrainedConfig()), *dir(PreTrainedConfig)}
    for name in names:
        if name in known:
            continue
        similar = [field for field in field_names if field.startswith(f"{name}_")]
        similar += get_close_matches(name, [*field_names, *properties], n=1, cutoff=0.8)
        if similar:
            raise ValueError(f"{where or kind.__name__} has no field '{name}'; did you mean '{similar[0]}'?")


def declared_fields(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Fields that a configuration does not inherit from transformers, with their types."""
    names = {field.name for field in fields(kind)}
    classes = [base for base in kind.__mro__ if base not in PreTrainedConfig.__mro__]
    return {name: hint for base in classes for name, hint in base.__annotations__.items() if name in names}
