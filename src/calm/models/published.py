"""Released CALM checkpoints -> our model folders.

The released format is two folders, `autoencoder/` and `calm/`, each with a config.json and weights.
Its autoencoder is repeated inside the language model's weights, its path is recorded as it was on
the training machine, and the kind of head is told by `architectures` only.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from calm.errors import InputError, reason_of
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig

_HEADS = {"EnergyTransformer": "energy", "FlowTransformer": "flow", "DiffusionTransformer": "diffusion"}

# Released name -> ours, tried in order; the rest of a name is kept.
_AUTOENCODER_NAMES = [
    (r"^(encoder|decoder)\.(?:en|de)coder_layers\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"\1.blocks.\2.\3."),
    (r"^(encoder|decoder)\.(?:en|de)coder_layers\.(\d+)\.layernorm\.", r"\1.blocks.\2.norm."),
    (r"^encoder\.squeeze_layer\.", "encoder.squeeze."),
    (r"^encoder\.hidden_to_latent\.", "encoder.out."),
    (r"^decoder\.latent_to_hidden\.", "decoder.inp."),
    (r"^decoder\.expand_layer\.", "decoder.expand."),
]
_MODEL_NAMES = [
    (r"^transformer\.", "backbone."),
    (r"^embed_proj\.0\.", "projection.expand."),
    (r"^embed_proj\.2\.", "projection.squeeze."),
    (r"^embed_proj\.3\.", "projection.norm."),
]
_ENERGY_HEAD_NAMES = [
    (r"^noise_embd\.", "noise_in."),
    (r"^hidden_embd\.", "condition_in."),
    (r"^norm_noise\.", "noise_norm."),
    (r"^norm_hidden\.", "condition_norm."),
    (r"^mlp_blocks\.(\d+)\.in_ln\.", r"blocks.\1.norm."),
    (r"^mlp_blocks\.(\d+)\.linears\.0\.", r"blocks.\1.merge."),
    (r"^mlp_blocks\.(\d+)\.linears\.2\.", r"blocks.\1.hidden."),
    (r"^mlp_blocks\.(\d+)\.linears\.4\.", r"blocks.\1.gate_and_up."),
    (r"^mlp_blocks\.(\d+)\.down_proj\.", r"blocks.\1.down."),
    (r"^final_layer\.in_ln\.", "out_norm."),
    (r"^final_layer\.linears\.0\.", "out_hidden."),
    (r"^final_layer\.linears\.2\.", "out."),
]
_ADAPTIVE_HEAD_NAMES = [
    (r"^net\.time_embed\.mlp\.0\.", "network.times.0.inp."),
    (r"^net\.time_embed\.mlp\.2\.", "network.times.0.out."),
    (r"^net\.cond_embed\.", "network.condition_in."),
    (r"^net\.input_proj\.", "network.inp."),
    (r"^net\.res_blocks\.(\d+)\.in_ln\.", r"network.blocks.\1.norm."),
    (r"^net\.res_blocks\.(\d+)\.mlp\.0\.", r"network.blocks.\1.up."),
    (r"^net\.res_blocks\.(\d+)\.mlp\.2\.", r"network.blocks.\1.down."),
    (r"^net\.res_blocks\.(\d+)\.adaLN_modulation\.1\.", r"network.blocks.\1.modulation."),
    (r"^net\.final_layer\.adaLN_modulation\.1\.", "network.out_modulation."),
    (r"^net\.final_layer\.linear\.", "network.out."),
]


def load_published(autoencoder: Path, model: Path) -> CalmForCausalLM:
    """Read a released autoencoder and language model as one of our models.

    Args:
        autoencoder: Folder with the autoencoder's config.json and weights.
        model: Folder with the language model's config.json and weights.

    Raises:
        InputError: If a file is missing or damaged, or the two do not belong together.
    """
    ae_config, lm_config = _read_config(autoencoder), _read_config(model)
    try:
        config = _convert_config(ae_config, lm_config, model)
    except KeyError as error:
        raise InputError(
            f"the configurations in '{autoencoder}' and '{model}' lack the field {error}; "
            "give the two folders as they were released."
        ) from error
    head_names = _ENERGY_HEAD_NAMES if config.head.head_type == "energy" else _ADAPTIVE_HEAD_NAMES
    weights = {f"autoencoder.{name}": tensor for name, tensor in _autoencoder_weights(autoencoder).items()}
    for name, tensor in _read_weights(model).items():
        if name.startswith("generative_head."):
            head_name = _rename(name.removeprefix("generative_head."), head_names)
            weights[f"head.{head_name}"] = tensor
        # `ae_model` repeats the autoencoder, `mlp_generator` the head.
        elif not name.startswith(("ae_model.", "mlp_generator.")):
            weights[_rename(name, _MODEL_NAMES)] = tensor
    result = CalmForCausalLM(config)
    try:
        result.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[1].strip()
        raise InputError(
            f"the weights in '{autoencoder}' and '{model}' do not fit their configurations: {problem}"
        ) from error
    return result.eval()


def _convert_config(ae: dict[str, Any], lm: dict[str, Any], model: Path) -> CalmConfig:
    architecture = (lm.get("architectures") or ["none"])[0]
    if architecture not in _HEADS:
        raise InputError(
            f"'{model}' has the architecture {architecture}, which cannot be imported; "
            f"known: {', '.join(_HEADS)}."
        )
    for field, meaning in (("patch_size", "tokens per chunk"), ("latent_size", "latent dimensions")):
        if ae[field] != lm[field]:
            raise InputError(
                f"the autoencoder has {ae[field]} {meaning} and the language model {lm[field]}; "
                "give the two folders that were released together."
            )
    special: dict[str, Any] = {
        name: lm.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    theta = lm.get("rope_theta", 10000.0)
    return CalmConfig(
        autoencoder_config=CalmAutoencoderConfig(
            vocab_size=ae["vocab_size"],
            chunk_size=ae["patch_size"],
            latent_size=ae["latent_size"],
            hidden_size=ae["hidden_size"],
            intermediate_size=ae["intermediate_size"],
            num_encoder_layers=ae["num_encoder_layers"],
            num_decoder_layers=ae["num_decoder_layers"],
            token_dropout=ae["ae_dropout"],
            latent_dropout=ae["ae_dropout"],
            kl_weight=ae["kl_weight"],
            kl_floor=ae["kl_clamp"],
            dropped_token_id=0,
            rms_norm_eps=ae["rms_norm_eps"],
            **special,
        ),
        backbone_config={
            "hidden_size": lm["hidden_size"],
            "intermediate_size": lm["intermediate_size"],
            "num_hidden_layers": lm["num_hidden_layers"],
            "num_attention_heads": lm["num_attention_heads"],
            "num_key_value_heads": lm.get("num_key_value_heads"),
            "max_position_embeddings": lm["max_position_embeddings"],
            "rms_norm_eps": lm["rms_norm_eps"],
            "attention_bias": lm.get("attention_bias", False),
            "rope_parameters": {
                "rope_theta": theta,
                "rope_type": "default",
                **(lm.get("rope_scaling") or {}),
            },
        },
        head_config=_convert_head(_HEADS[architecture], lm),
        initializer_range=lm.get("initializer_range", 0.02),
        **special,
    )


def _convert_head(head_type: str, lm: dict[str, Any]) -> dict[str, Any]:
    """The head's fields; what the released code fixes, its checkpoints do not say."""
    fields = {"head_type": head_type, "num_blocks": lm["num_mlp_layers"], "num_draws": lm["num_samples"]}
    fields["layer_norm_eps"] = 1e-6
    if head_type == "energy":
        return fields | {"noise_size": lm["noise_size"], "num_posterior_draws": 100, "alpha": lm["beta"]}
    fields["frequency_size"] = 256
    if head_type == "flow":
        return fields | {"solver": "midpoint", "num_steps": 10, "time_bins": 1000}
    fields |= {"num_timesteps": 1000, "sampler": "ancestral", "num_steps": 100}
    return fields | {"data_bound": 0.0, "image_likelihood": True}


def _autoencoder_weights(folder: Path) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in _read_weights(folder).items():
        # The vocabulary projection is tied to the embedding.
        if name != "decoder.lm_head_weight":
            weights[_rename(name, _AUTOENCODER_NAMES)] = tensor
    return weights


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"there is no config.json in '{folder}'; check the path.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"'{path}' is not JSON ({error}); download it again.") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: safetensors or pytorch_model.bin, whole or in shards, on the CPU."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / f"{stem}.{suffix}").is_file():
            shards = [f"{stem}.{suffix}"]
        else:
            continue
        weights: dict[str, Tensor] = {}
        for shard in shards:
            weights |= _read_shard(folder / shard)
        return weights
    raise InputError(f"there are no weights in '{folder}' (model.safetensors or pytorch_model.bin).")


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # weights_only refuses pickles that could run code.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"cannot read '{path}': it is truncated or damaged ({reason_of(error)}).") from error
