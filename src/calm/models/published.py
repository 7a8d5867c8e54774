"""Released CALM checkpoints -> our model folders.

The released format is two folders, `autoencoder/` and `calm/`, each with a config.json and weights.
The language model's weights repeat the autoencoder, whose path is recorded as it was on the training
machine, and only `architectures` says which head it has.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm.errors import InputError, cause_of
from calm.hub.opening import read_settings
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.weights import check_finite, check_size, read_headers, read_weights

_HEADS = {"EnergyTransformer": "energy", "FlowTransformer": "flow", "DiffusionTransformer": "diffusion"}

# Released name -> ours: the first matching pattern is replaced, and the rest of the name is kept.
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
    """Load a released autoencoder and language model as one of our models.

    Args:
        autoencoder: Folder with the autoencoder's config.json and weights.
        model: Folder with the language model's config.json and weights.

    Raises:
        InputError: If a file is missing or damaged, or the two do not belong together.
    """
    ae_config, lm_config = _read_config(autoencoder), _read_config(model)
    try:
        config = _convert_config(ae_config, lm_config, model)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(
            f"the configurations in '{autoencoder}' and '{model}' lack the field {error}; "
            "use the two folders as they were released."
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"no model can be built from the configurations in '{autoencoder}' and '{model}' "
            f"({cause_of(error)}); use the two folders as they were released."
        ) from error
    for folder, part in ((autoencoder, config.autoencoder), (model, config)):
        check_size(part, read_headers(folder), str(folder))
    head_names = _ENERGY_HEAD_NAMES if config.head.head_type == "energy" else _ADAPTIVE_HEAD_NAMES
    weights = {f"autoencoder.{name}": tensor for name, tensor in _autoencoder_weights(autoencoder).items()}
    for name, tensor in read_weights(model).items():
        if name.startswith("generative_head."):
            head_name = _rename(name.removeprefix("generative_head."), head_names)
            weights[f"head.{head_name}"] = tensor
        # `ae_model` repeats the autoencoder, `mlp_generator` the head.
        elif not name.startswith(("ae_model.", "mlp_generator.")):
            weights[_rename(name, _MODEL_NAMES)] = tensor
    with torch.device("meta"):
        _load_weights(CalmForCausalLM(config), weights, autoencoder, model)
    network = CalmForCausalLM(config)
    _load_weights(network, weights, autoencoder, model)
    check_finite(network, f"{autoencoder}' and '{model}")
    return network.eval()


def _load_weights(
    network: CalmForCausalLM, weights: dict[str, Tensor], autoencoder: Path, model: Path
) -> None:
    """Load weights into a network; on the meta device, only check that they fit."""
    try:
        for name, weight in weights.items():
            if not weight.is_floating_point():
                raise ValueError(f"{name} has dtype {weight.dtype}, which is not floating point.")
        network.load_state_dict(weights, strict=True, assign=next(network.parameters()).is_meta)
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines()  # The first of several lines only names the class.
        problem = lines[min(1, len(lines) - 1)].strip()
        raise InputError(
            f"the weights in '{autoencoder}' and '{model}' do not fit their configurations: {problem}"
        ) from error


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
                f"the autoencoder has {ae[field]} {meaning} but the language model has {lm[field]}; "
                "use two folders that were released together."
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
    """The head's fields; the constants are hard-coded in the released code, not in its checkpoints."""
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
    for name, tensor in read_weights(folder).items():
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
    return read_settings(path)
