"""Checks of a GGUF file before its weights are read.

transformers ignores whatever it does not know in such a file, such as RoPE scaling. So a file with tensors
other than those of the supported models is refused.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from calm.errors import InputError, reason_of
from calm.hub.gguf import local_file
from calm.models.token_layers import LIKE_LLAMA

_LAYER_WEIGHTS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip
_EXTRA_TENSORS = {  # Of each layer, by model type.
    "qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": ("attn_q_norm.weight", "attn_k_norm.weight"),
}
_ROPE_FACTORS = "rope_freqs.weight"
_MIN_BYTES = 0.1  # Per parameter, in the smallest data type.


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
        scaling = [_read_string(reader, key) for key in reader.fields if key.endswith(".rope.scaling.type")]
    except Exception as error:  # numpy raises various ones on damaged files.
        raise InputError(f"cannot load '{name}': it is damaged ({reason_of(error)}).") from error
    layers, weights, size = config.num_hidden_layers, _num_weights(config), file.stat().st_size
    if layers > len(names) or weights * _MIN_BYTES > size:
        raise InputError(
            f"'{name}' describes {layers:,} layers and {weights:,} weights, but has {len(names):,} tensors "
            f"and {size:,} bytes; it is damaged."
        )
    unknown = sorted(names - set(_known_tensors(config)))
    if any(kind != "none" for kind in scaling) or _ROPE_FACTORS in unknown:
        raise InputError(
            f"'{name}' uses RoPE scaling, which transformers does not read from GGUF; use the model's folder "
            "with safetensors instead."
        )
    if unknown:
        raise InputError(
            f"'{name}' contains {unknown[0]}, which is not supported for {config.model_type} models; use the "
            "model's folder with safetensors instead."
        )


def _read_string(reader: Any, key: str) -> str:
    field = reader.fields[key]
    return bytes(field.parts[field.data[0]]).decode()


def _known_tensors(config: PreTrainedConfig) -> Iterator[str]:
    """Names of all tensors that a file may contain."""
    yield from ("token_embd.weight", "output_norm.weight", "output.weight")
    tensors = (*(f"{name}.weight" for name in _LAYER_WEIGHTS), *_EXTRA_TENSORS.get(config.model_type, ()))
    for layer in range(config.num_hidden_layers):
        yield from (f"blk.{layer}.{tensor}" for tensor in tensors)


def _num_weights(config: PreTrainedConfig) -> int:
    """Number of weights in the largest matrices: MLPs and the embedding."""
    layers = 3 * config.num_hidden_layers * config.intermediate_size
    return config.hidden_size * (layers + config.vocab_size)
