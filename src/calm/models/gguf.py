"""Checks of a GGUF file before its weights are read: everything in it must be known here.

transformers builds the configuration and ignores what it does not know, such as RoPE scaling. So a file with
anything but the layers of the supported models is refused.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from calm.errors import InputError, reason_of
from calm.hub.gguf import local_file
from calm.models.token_layers import LIKE_LLAMA

_OF_LAYER = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip
_MORE = {
    "qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": ("attn_q_norm.weight", "attn_k_norm.weight"),
}
_FACTORS = "rope_freqs.weight"
_LEAST_BYTES = 0.1  # Per parameter, in the smallest data type.


def check_gguf(config: PreTrainedConfig, name: str) -> None:
    """Check that a file holds exactly the model that its configuration describes.

    Args:
        config: The configuration that was read from it.
        name: The file, local or on the hub.

    Raises:
        InputError: If the model type is not supported, the file is damaged, scales positions or holds extra
            tensors, or it describes more weights than fit in it.
    """
    import gguf  # noqa: PLC0415 (an optional extra)

    if config.model_type not in LIKE_LLAMA:
        raise InputError(
            f"'{name}' is a model of type '{config.model_type}', which cannot be read from GGUF; "
            f"supported: {', '.join(LIKE_LLAMA)}."
        )
    file = local_file(name)
    try:
        reader: Any = gguf.GGUFReader(file)
        names = {tensor.name for tensor in reader.tensors}
        scaling = [_text(reader, key) for key in reader.fields if key.endswith(".rope.scaling.type")]
    except Exception as error:  # numpy raises various ones on damaged files.
        raise InputError(f"cannot load '{name}': it is damaged ({reason_of(error)}).") from error
    layers, weights, size = config.num_hidden_layers, _num_weights(config), file.stat().st_size
    if layers > len(names) or weights * _LEAST_BYTES > size:
        raise InputError(
            f"'{name}' describes {layers:,} layers and {weights:,} weights, but has {len(names):,} tensors "
            f"and {size:,} bytes; it is damaged."
        )
    more = sorted(names - set(_names(config)))
    if any(one != "none" for one in scaling) or _FACTORS in more:
        raise InputError(
            f"'{name}' uses RoPE scaling, which transformers does not read from GGUF; use the model's folder "
            "with safetensors instead."
        )
    if more:
        raise InputError(
            f"'{name}' contains {more[0]}, which is not supported for {config.model_type} models; use the "
            "model's folder with safetensors instead."
        )


def _text(reader: Any, key: str) -> str:
    field = reader.fields[key]
    return bytes(field.parts[field.data[0]]).decode()


def _names(config: PreTrainedConfig) -> Iterator[str]:
    """Names of all tensors that a file may contain."""
    yield from ("token_embd.weight", "output_norm.weight", "output.weight")
    parts = (*(f"{part}.weight" for part in _OF_LAYER), *_MORE.get(config.model_type, ()))
    for layer in range(config.num_hidden_layers):
        yield from (f"blk.{layer}.{part}" for part in parts)


def _num_weights(config: PreTrainedConfig) -> int:
    """Number of weights in the largest matrices: MLPs and the embedding."""
    layers = 3 * config.num_hidden_layers * config.intermediate_size
    return config.hidden_size * (layers + config.vocab_size)
