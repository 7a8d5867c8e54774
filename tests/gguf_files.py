"""Small GGUF files, written with the gguf package as llama.cpp's converter writes them.

python tests/gguf_files.py model.gguf    # a model with random weights
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer

TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_CONTROL, _NORMAL = 3, 1
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def gguf_is_not_read() -> bool:
    """Whether transformers is too old to read these files."""
    return tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "F32",
    architecture: str | None = None,
    scaling: str | None = None,
    more: dict[str, np.ndarray] | None = None,
    leave_out: str = "nothing",
    **changes: int,
) -> Path:
    """Write a model with its tokenizer.

    Args:
        file: Path of the new file.
        model: A model with Llama's layers.
        tokenizer: A byte-level BPE.
        kind: Type of the matrices; norms are always F32.
        architecture: Its name in the header, if not the model's type.
        scaling: Kind of RoPE scaling.
        more: Additional tensors.
        leave_out: Tensors with this in their names are left out.
        **changes: Wrong sizes for the header.
    """
    config, type_of_model = model.config, model.config.model_type
    writer = gguf.GGUFWriter(file, architecture or type_of_model)
    writer.add_block_count(changes.get("layers", config.num_hidden_layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(changes.get("width", config.hidden_size))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_size)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    _add_tokens(writer, tokenizer)
    for name, weight in model.state_dict().items():
        if leave_out in name or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = weight.float().numpy()
        if type_of_model == "llama" and ("q_proj" in name or "k_proj" in name):
            values = _interleaved(values, head_size)
        for llama_name, gguf_name in _NAMES.items():
            name = name.replace(llama_name, gguf_name)
        tensor_type = TYPES[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, tensor_type), raw_dtype=tensor_type)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(values: np.ndarray, head_size: int) -> np.ndarray:
    """Interleave the two halves of each head of queries or keys: llama.cpp rotates adjacent rows."""
    return values.reshape(-1, 2, head_size // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([_CONTROL if word in special else _NORMAL for word in words])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)


if __name__ == "__main__":
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    write_gguf(
        Path(sys.argv[1]),
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300)),
        train_tokenizer(stories(0, 12), 300),
    )
