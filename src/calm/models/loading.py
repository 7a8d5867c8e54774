"""Loading models and tokenizers, with plain error messages about what is wrong with them."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from calm.core.chunks import as_id_tensor
from calm.errors import InputError, cause_of, reason_of
from calm.extras import require
from calm.hub.gguf import is_gguf
from calm.hub.opening import (
    base_of_adapters,
    open_adapters,
    open_config,
    open_network,
    open_tokenizer,
    read_settings,
)
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.fields import check_generation, check_switches
from calm.models.foreign import check_transformer
from calm.models.generation.ahead import find_steps, forget_steps
from calm.models.gguf import check_gguf
from calm.models.hyperparameters import CALM_TYPES
from calm.models.missing import check_model_exists, no_model_in, not_loaded_from_hub, resolve_name
from calm.models.registration import register
from calm.models.shipped import folder_of
from calm.models.thoughts import thoughts_of
from calm.models.tokens import LlamaForCausalLM
from calm.models.weights import (
    check_complete,
    check_finite,
    check_headers,
    check_parameters,
    check_size,
    read_headers,
)
from calm.storage.checksums import check_intact
from calm.text.chat import end_of_turn_id
from calm.text.vocabulary import check_ids

register()
Model = TypeVar("Model", bound=PreTrainedModel)
THOUGHTS = "thoughts.json"
"""File next to adapters that says how the adapted model thinks: adapters have no model configuration."""
# Our classes by model type; they take precedence over those of transformers.
_CLASSES: dict[str | None, type[PreTrainedModel]] = {"calm": CalmForCausalLM, "llama": LlamaForCausalLM}


def load_autoencoder(path: Path | str) -> CalmAutoencoder:
    """Load an autoencoder from its own folder or from the folder of a model that contains it.

    Raises:
        InputError: If there is none, or the folder is damaged.
    """
    path = Path(folder_of(str(path)))
    config = load_config(path)
    if isinstance(config, CalmConfig):
        return load_model(str(path)).autoencoder
    _autoencoder_config_in(config, path)  # Raises if there is none.
    return _load(CalmAutoencoder, str(path))


def load_autoencoder_config(path: Path) -> CalmAutoencoderConfig:
    """The configuration of an autoencoder, from its own folder or that of a model that contains it.

    Raises:
        InputError: If there is none, or it cannot be read.
    """
    return _autoencoder_config_in(load_config(path), path)


def _autoencoder_config_in(config: PreTrainedConfig, path: Path) -> CalmAutoencoderConfig:
    if isinstance(config, CalmConfig):
        return config.autoencoder
    if not isinstance(config, CalmAutoencoderConfig):
        raise InputError(f"'{path}' holds a model of type '{config.model_type}', not an autoencoder.")
    return config


def load_model(name: str, **kwargs: Any) -> CalmForCausalLM:
    """Load a CALM from a folder, the package or the hub.

    Raises:
        InputError: If there is none, it is not a CALM, or the folder is damaged.
    """
    name = resolve_name(name)
    if Path(name).is_dir() and (kind := load_config(Path(name)).model_type) != "calm":
        raise InputError(f"'{name}' holds a model of type '{kind}', not a CALM language model.")
    return _load(CalmForCausalLM, name, **kwargs)


def load_model_and_tokenizer(
    name: str | Path, **kwargs: Any
) -> tuple[CalmForCausalLM, PreTrainedTokenizerBase]:
    """Load a CALM onto this machine's best device, with its tokenizer.

    Raises:
        InputError: As `load_language_model_and_tokenizer`, or if the model is not a CALM.
    """
    model, tokenizer = load_language_model_and_tokenizer(name, **kwargs)
    if not isinstance(model, CalmForCausalLM):
        kind = model.config.model_type
        raise InputError(f"'{name}' holds a model of type '{kind}', not a CALM language model.")
    return model, tokenizer


def load_language_model_and_tokenizer(
    name: str | Path, head: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a CALM or any causal language model of transformers, with its tokenizer.

    Args:
        name: Folder of a model or of adapters, GGUF file, name of a shipped model, or hub name.
        head: Changes to how a CALM's head samples.
        **kwargs: Arguments of `from_pretrained`.

    Raises:
        InputError: If either is missing or damaged, the tokenizer has no EOS or more tokens than the model,
            or the head does not allow the changes.
    """
    name = resolve_name(str(name))
    if is_adapter(Path(name)):
        model = _load_with_adapters(Path(name), **kwargs)
        return _prepare(*_with_tokenizer(model, name), name, head)
    kind = load_config(Path(name)).model_type if Path(name).is_dir() else _model_type_of(name)
    if kind == "calm_autoencoder":
        raise InputError(f"'{name}' holds an autoencoder, not a language model; give the model folder.")
    model = _load(_CLASSES.get(kind, AutoModelForCausalLM), name, **kwargs)
    return _prepare(*_with_tokenizer(model, name), name, head)


def load_transformer(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model with the classes of transformers, on the CPU and without its tokenizer.

    Args:
        name: Folder, GGUF file or hub name.
        **kwargs: Arguments of `from_pretrained`.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    network: PreTrainedModel = _load(AutoModelForCausalLM, resolve_name(name), **kwargs)
    return network


def check_readable(name: str) -> None:
    """Check, from file headers alone, that a model's weights are there and complete.

    A model on the hub is not checked until it is loaded.

    Args:
        name: Folder, GGUF file or hub name.

    Raises:
        InputError: If weights are missing, truncated, or do not match the configuration.
    """
    path = Path(resolve_name(name))
    if path.is_dir():
        check_size(load_config(path), read_headers(path), str(path))
    elif is_gguf(str(path)) and path.exists():
        check_gguf(config_of(name), str(path))


def is_adapter(path: Path) -> bool:
    """Whether a folder holds low-rank adapters for a model stored elsewhere."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _load_with_adapters(path: Path, **kwargs: Any) -> PreTrainedModel:
    """Load the base model of adapters, with the adapters merged into its weights."""
    require(f"'{path}', a folder of adapters,", "peft")
    try:
        base = base_of_adapters(path)
    except InputError:
        raise
    except Exception as error:  # From json or peft.
        raise InputError(f"cannot load the adapters in '{path}' ({cause_of(error)}).") from error
    try:
        model, _ = load_language_model_and_tokenizer(base, **kwargs)
    except InputError as error:
        raise InputError(f"the base model of the adapters in '{path}': {error}") from error
    try:
        merged: PreTrainedModel = open_adapters(model, path).merge_and_unload()
    except InputError:
        raise
    except Exception as error:  # From json, safetensors or peft.
        raise InputError(f"cannot load the adapters in '{path}' ({cause_of(error)}).") from error
    forget_steps(merged)  # The compiled steps are those of the base model.
    check_finite(merged, str(path))
    merged.requires_grad_(True)  # As in any loaded model; peft froze them.
    if (path / THOUGHTS).is_file():
        merged.config.thoughts = read_settings(path / THOUGHTS) or None
        try:
            thoughts_of(merged.config)
        except ValueError as error:
            raise InputError(f"'{path / THOUGHTS}': {error}") from error
    return merged.eval()


def _prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, head: dict[str, Any] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Set how a loaded model samples, ends texts and pads them."""
    if head:
        change_head(model, head)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in '{name}' has no EOS token; set its eos_token.")
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any token will do.
        tokenizer.pad_token_id = tokenizer.eos_token_id
    add_eos_ids(model, tokenizer)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if isinstance(model, CalmForCausalLM):
        find_steps(model)  # Now, so that the first text need not wait.
    return model, tokenizer


def add_eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the tokenizer's EOS and its chat template's end-of-turn token to the model's EOS ids.

    The tokenizer decides how texts end, so generation and scoring must know these ids. Each reads a
    configuration of its own, and the ids already there are kept.
    """
    added = [end for end in (tokenizer.eos_token_id, end_of_turn_id(tokenizer)) if end is not None]
    for config in (model.config, model.generation_config):
        ends = as_id_tensor(config.eos_token_id, torch.device("cpu")).tolist()
        if missing := [end for end in dict.fromkeys(added) if end not in ends]:
            config.eos_token_id = [*ends, *missing]


def _with_tokenizer(model: Model, name: str) -> tuple[Model, PreTrainedTokenizerBase]:
    try:
        tokenizer = open_tokenizer(name)
    except InputError:
        raise
    except Exception as error:  # From tokenizers, jinja or json.
        raise InputError(f"cannot load the tokenizer in '{name}' ({reason_of(error)}).") from error
    check_ids(tokenizer, model.config.get_text_config().vocab_size, name)
    torch.nn.Module.to(model, best_device())
    return model, tokenizer


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a model in a folder, in a GGUF file, or on the hub; for adapters, their model's.

    Raises:
        InputError: If there is none, or it cannot be read.
    """
    resolved = resolve_name(name)
    path = Path(resolved)
    if path.is_dir():
        if is_adapter(path):  # Merging does not change the sizes.
            return config_of(base_of_adapters(path))
        return load_config(path)
    check_model_exists(name)
    try:
        config = open_config(resolved)
        # GGUF files get the stricter `check_gguf`.
        return config if is_gguf(resolved) else _checked(config)
    except InputError:
        raise
    except Exception as error:  # From the hub client or the configuration's class.
        raise _load_error(resolved, error) from error


def _load_error(name: str, error: Exception) -> InputError:
    if Path(name).exists():
        return InputError(f"cannot load '{name}': it is damaged, or not supported ({reason_of(error)}).")
    return InputError(not_loaded_from_hub(name, reason_of(error)))


def load_config(path: Path) -> PreTrainedConfig:
    """The configuration in a folder.

    Raises:
        InputError: If there is none, or it cannot be read.
    """
    if not (path / "config.json").is_file():
        raise InputError(no_model_in(str(path)))
    try:
        return _checked(open_config(str(path)))
    except InputError:
        raise
    except Exception as error:  # From the configuration's class.
        raise InputError(f"the configuration in '{path}' cannot be read ({cause_of(error)}).") from error


def _checked(config: PreTrainedConfig) -> PreTrainedConfig:
    """Check a configuration before anything is built from it; our own classes check themselves."""
    if config.model_type not in CALM_TYPES:
        check_transformer(config)
    return config


def _model_type_of(name: str) -> str | None:
    """Model type of a GGUF file or a hub name; None on an error, which loading will report."""
    try:
        return open_config(name).model_type
    except Exception:
        return None


def _load(model_class: Any, name: str, **kwargs: Any) -> Any:
    if Path(name).is_dir():
        _check_folder(model_class, Path(name))
    if is_gguf(name):
        check_gguf(config_of(name), name)
    try:
        # With other shapes the library raises an error that does not name them; `check_complete` does.
        model, info = open_network(model_class, name, ignore_mismatched_sizes=True, **kwargs)
    except InputError:
        raise
    except Exception as error:  # safetensors, json, the hub client: each has its own exceptions.
        raise _load_error(name, error) from error
    check_complete(info, name)
    check_finite(model, name)
    if isinstance(model, CalmForCausalLM):
        try:
            model.head.check_loaded()
        except ValueError as error:
            raise InputError(f"the weights in '{name}' cannot be used: {error}") from error
    settings = read_settings(Path(name) / "generation_config.json")  # transformers ignores bad values.
    try:
        check_generation(settings, model.config.vocab_size if isinstance(model, CalmForCausalLM) else None)
    except ValueError as error:
        raise InputError(f"'{name}/generation_config.json': {error}") from error
    model.config.return_dict = True  # Everything reads its outputs by name.
    return model.eval()


def _check_folder(model_class: Any, folder: Path) -> None:
    """Check a model folder before allocating any memory for the model.

    Raises:
        InputError: If files changed since they were written, or configuration and weights do not match.
    """
    check_intact(folder)
    config, headers = load_config(folder), read_headers(folder)
    check_size(config, headers, str(folder))
    try:
        check_switches(vars(config))
        thoughts_of(config)
        with torch.device("meta"):
            network = getattr(model_class, "from_config", model_class)(config)
    except Exception as error:  # From the model's class.
        raise InputError(
            f"no model can be built from the configuration in '{folder}' ({cause_of(error)})."
        ) from error
    check_parameters(network, headers, str(folder))
    if config.model_type in CALM_TYPES:  # Others may pack weights in their own formats.
        check_headers(network, headers, str(folder))


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA devices that support it, else float32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def best_device() -> torch.device:
    """This machine's accelerator, or its CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def change_head(target: PreTrainedModel | PreTrainedConfig, changes: dict[str, Any]) -> None:
    """Change how the head of a CALM samples, in the model or in its configuration.

    Raises:
        InputError: If it is not a CALM, or its head does not allow the changes.
    """
    if not isinstance(target, CalmForCausalLM | CalmConfig):
        raise InputError("only a CALM has a head with sampling settings; leave out --head.")
    try:
        target.change_sampling(**changes)
    except ValueError as error:
        raise InputError(str(error)) from error
