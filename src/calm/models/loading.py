"""Opening folders of weights, with plain words about what is wrong with them."""

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
from calm.models.gguf import check_gguf
from calm.models.missing import look_for, no_model_in, not_given, place_of
from calm.models.registration import register
from calm.models.shipped import folder_of
from calm.models.thoughts import thoughts_of
from calm.models.tokens import LlamaForCausalLM
from calm.models.weights import check_finite, check_headers, check_parameters, check_size, read_headers
from calm.models.writing.ahead import find_steps, forget_steps
from calm.storage.checksums import check_as_written
from calm.text.chat import end_of_turn_id

register()
Model = TypeVar("Model", bound=PreTrainedModel)
THOUGHTS = "thoughts.json"
"""How a model thinks with adapters that taught it to; beside them, for they have no configuration of it."""
# Classes of our own, for models that others know as well.
_OWN: dict[str | None, type[PreTrainedModel]] = {"calm": CalmForCausalLM, "llama": LlamaForCausalLM}


def load_autoencoder(path: Path) -> CalmAutoencoder:
    """An autoencoder from its own folder or from a model folder that has it inside.

    Raises:
        InputError: If there is none, or the folder is damaged.
    """
    path = Path(folder_of(str(path)))
    config = load_config(path)
    if isinstance(config, CalmConfig):
        return load_model(str(path)).autoencoder
    _autoencoder_in(config, path)
    return _load(CalmAutoencoder, str(path))


def load_autoencoder_config(path: Path) -> CalmAutoencoderConfig:
    """The configuration of an autoencoder, from its own folder or from a model folder that has it inside.

    Raises:
        InputError: If there is none, or it cannot be read.
    """
    return _autoencoder_in(load_config(path), path)


def _autoencoder_in(config: PreTrainedConfig, path: Path) -> CalmAutoencoderConfig:
    if isinstance(config, CalmConfig):
        return config.autoencoder
    if not isinstance(config, CalmAutoencoderConfig):
        raise InputError(f"'{path}' holds a model of type '{config.model_type}', not an autoencoder.")
    return config


def load_model(name: str, **kwargs: Any) -> CalmForCausalLM:
    """A language model from a folder, of the package, or from the hub.

    Raises:
        InputError: If there is none, it is of another kind, or the folder is damaged.
    """
    name = place_of(name)
    if Path(name).is_dir() and (kind := _model_type(Path(name))) != "calm":
        raise InputError(f"'{name}' holds a model of type '{kind}', not a CALM language model.")
    return _load(CalmForCausalLM, name, **kwargs)


def load_model_and_tokenizer(name: str, **kwargs: Any) -> tuple[CalmForCausalLM, PreTrainedTokenizerBase]:
    """A CALM on the best device of this machine, and the tokenizer beside it.

    Raises:
        InputError: If either is missing or damaged, or the tokenizer has more tokens than the model.
    """
    name = place_of(name)
    model, tokenizer = _with_tokenizer(load_model(name, **kwargs), name)
    find_steps(model)  # Before the first text waits for it.
    return model, tokenizer


def load_language_model_and_tokenizer(
    name: str, head: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A CALM or any causal language model of transformers, and the tokenizer beside it.

    Args:
        name: Folder of a model or of adapters, GGUF file, name of a model of the package, or name on the hub.
        head: Changes of how the head of a CALM is drawn from.
        **kwargs: Arguments of `from_pretrained`.

    Raises:
        InputError: If either is missing or damaged, the tokenizer has more tokens than the model, or the head
            cannot be changed so.
    """
    name = place_of(name)
    if is_adapter(Path(name)):
        model = _with_adapters(Path(name), **kwargs)
        return _ready(*_with_tokenizer(model, name), name, head)
    kind = _model_type(Path(name)) if Path(name).is_dir() else _model_type_of(name)
    if kind == "calm_autoencoder":
        raise InputError(f"'{name}' holds an autoencoder, not a language model; give the model folder.")
    model_class = _OWN.get(kind, AutoModelForCausalLM)
    return _ready(*_with_tokenizer(_load(model_class, name, **kwargs), name), name, head)


def load_transformer(name: str, **kwargs: Any) -> PreTrainedModel:
    """A causal language model of transformers that another is made of: on the processor, and no more than it.

    Args:
        name: Folder, GGUF file or hub name.
        **kwargs: Arguments of `from_pretrained`.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    network: PreTrainedModel = _load(AutoModelForCausalLM, place_of(name), **kwargs)
    return network


def check_readable(name: str) -> None:
    """See that the weights of a model are there and their files whole, as far as headers tell.

    Of a model on the hub nothing is seen before it is loaded.

    Args:
        name: Folder, GGUF file or hub name.

    Raises:
        InputError: If weights are missing, truncated, or not those of the configuration.
    """
    place = place_of(name)
    if Path(place).is_dir():
        check_size(load_config(Path(place)), read_headers(Path(place)), place)
    elif is_gguf(place) and Path(place).exists():
        check_gguf(config_of(name), place)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds low-rank adapters of a model that is elsewhere."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _with_adapters(path: Path, **kwargs: Any) -> PreTrainedModel:
    """The model that adapters belong to, with them added to its weights."""
    require(f"'{path}', a folder of adapters,", "peft")
    try:
        base = base_of_adapters(path)
    except InputError:
        raise
    except Exception as error:  # Of json, peft.
        raise InputError(f"cannot load the adapters in '{path}' ({cause_of(error)}).") from error
    try:
        model, _ = load_language_model_and_tokenizer(base, **kwargs)
    except InputError as error:
        raise InputError(f"the model that the adapters in '{path}' belong to: {error}") from error
    try:
        merged: PreTrainedModel = open_adapters(model, path).merge_and_unload()
    except InputError:
        raise
    except Exception as error:  # Of json, safetensors, peft.
        raise InputError(f"cannot load the adapters in '{path}' ({cause_of(error)}).") from error
    forget_steps(merged)  # What was compiled is the base's.
    check_finite(merged, str(path))
    merged.requires_grad_(True)  # As weights that are loaded are; peft froze them.
    if (path / THOUGHTS).is_file():
        merged.config.thoughts = read_settings(path / THOUGHTS) or None
        try:
            thoughts_of(merged.config)
        except ValueError as error:
            raise InputError(f"'{path / THOUGHTS}': {error}") from error
    return merged.eval()


def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, head: dict[str, Any] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that knows how texts are ended and padded, and draws as it was told."""
    if head:
        change_head(model, head)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in '{name}' has no token that ends a text; set its eos_token.")
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so a token that means something else will do.
        tokenizer.pad_token_id = tokenizer.eos_token_id
    end_as_told(model, tokenizer)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if isinstance(model, CalmForCausalLM):
        find_steps(model)  # Before the first text waits for it.
    return model, tokenizer


def end_as_told(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model's texts end by the tokenizer's EOS, and by what ends an answer in its chat template.

    Text is ended by the tokenizer, so whoever writes or scores must know those ids.
    """
    ends = as_id_tensor(model.config.eos_token_id, torch.device("cpu")).tolist()
    wanted = [end for end in (tokenizer.eos_token_id, end_of_turn_id(tokenizer)) if end is not None]
    if more := [end for end in dict.fromkeys(wanted) if end not in ends]:
        model.config.eos_token_id = [*ends, *more]
        model.generation_config.eos_token_id = model.config.eos_token_id


def _with_tokenizer(model: Model, name: str) -> tuple[Model, PreTrainedTokenizerBase]:
    try:
        tokenizer = open_tokenizer(name)
    except InputError:
        raise
    except Exception as error:  # Of the tokenizers library, of jinja, of json.
        raise InputError(f"'{name}' has no tokenizer that can be loaded ({reason_of(error)}).") from error
    size = model.config.get_text_config().vocab_size
    if (highest := max(tokenizer.get_vocab().values(), default=-1)) >= max(size, len(tokenizer)):
        raise InputError(
            f"the tokenizer in '{name}' has the token id {highest}, and the model {size} ids; put the "
            "model's own tokenizer there."
        )
    if len(tokenizer) > size:
        raise InputError(
            f"the tokenizer in '{name}' has {len(tokenizer)} tokens, more than the model's "
            f"{size}; put the model's own tokenizer there."
        )
    torch.nn.Module.to(model, best_device())
    return model, tokenizer


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a model in a folder, in a GGUF file, or on the hub; adapters have their model's.

    Raises:
        InputError: If there is none, or it cannot be read.
    """
    if Path(place := place_of(name)).is_dir():
        if is_adapter(Path(place)):  # Merged, they leave its sizes as they are.
            return config_of(base_of_adapters(Path(place)))
        return load_config(Path(place))
    look_for(name)
    try:
        config = open_config(place)
        return config if is_gguf(place) else _checked(config)  # Of a GGUF file `check_gguf` says more.
    except InputError:
        raise
    except Exception as error:  # Of the hub client, or of whichever class the configuration has.
        raise _not_loaded(place, error) from error


def _not_loaded(name: str, error: Exception) -> InputError:
    if Path(name).exists():
        return InputError(f"cannot load '{name}': it is damaged ({reason_of(error)}).")
    return InputError(not_given(name, reason_of(error)))


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
    except Exception as error:  # Of whichever class the configuration has.
        raise InputError(f"the configuration in '{path}' cannot be read ({cause_of(error)}).") from error


def _checked(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration, looked at before anything is built of it; ours look at themselves."""
    if config.model_type not in ("calm", "calm_autoencoder"):
        check_transformer(config)
    return config


def _model_type(path: Path) -> str:
    return load_config(path).model_type


def _model_type_of(name: str) -> str | None:
    """The type of a model in a file or on the hub; None where loading it will say what is wrong."""
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
        model, info = open_network(model_class, name, **kwargs)
    except InputError:
        raise
    except Exception as error:  # safetensors, json, the hub client: each has its own exceptions.
        raise _not_loaded(name, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"the weights in '{name}' are incomplete: {len(missing)} tensors are missing, "
            f"the first is {missing[0]}."
        )
    check_finite(model, name)
    if isinstance(model, CalmForCausalLM):
        try:
            model.head.check_loaded()
        except ValueError as error:
            raise InputError(f"the weights in '{name}' cannot be used: {error}") from error
    settings = read_settings(Path(name) / "generation_config.json")  # transformers passes by what is odd.
    try:
        check_generation(settings, model.config.vocab_size if isinstance(model, CalmForCausalLM) else None)
    except ValueError as error:
        raise InputError(f"'{name}/generation_config.json': {error}") from error
    model.config.return_dict = True  # All that reads its outputs does so by name.
    return model.eval()


def _check_folder(model_class: Any, folder: Path) -> None:
    """Look at what a folder says of a model before any memory is taken for it.

    Raises:
        InputError: If its files are not as they were written, or configuration and weights do not fit.
    """
    check_as_written(folder)
    config, headers = load_config(folder), read_headers(folder)
    check_size(config, headers, str(folder))
    try:
        check_switches(vars(config))
        thoughts_of(config)
        with torch.device("meta"):
            network = getattr(model_class, "from_config", model_class)(config)
    except Exception as error:  # Of whichever class it is.
        raise InputError(f"the configuration in '{folder}' makes no model ({cause_of(error)}).") from error
    check_parameters(network, headers, str(folder))
    if config.model_type in ("calm", "calm_autoencoder"):  # Others may be packed in ways of their own.
        check_headers(network, headers, str(folder))


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it at full speed, else float32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def best_device() -> torch.device:
    """The accelerator of this machine, or its processor."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def change_head(target: PreTrainedModel | PreTrainedConfig, changes: dict[str, Any]) -> None:
    """Change how the head of a CALM, or of its configuration, is drawn from.

    Raises:
        InputError: If it is no CALM, or its head cannot be changed so.
    """
    if not isinstance(target, CalmForCausalLM | CalmConfig):
        raise InputError("only a CALM has a head to draw from in another way; leave out --head.")
    try:
        target.change_sampling(**changes)
    except ValueError as error:
        raise InputError(str(error)) from error
