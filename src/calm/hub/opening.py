"""The only caller of `from_pretrained` for third-party files, none of whose code runs.

A folder or hub repository can name code of its own, packages to import, and kernels to download. Anything
that needs one of these is refused; the libraries would ask, or run it.
"""

import copy
import functools
import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from calm.errors import InputError, reason_of
from calm.hub.connection import hub_or_cache
from calm.hub.gguf import is_gguf, local_file

_MAX_SETTINGS_BYTES = 10_000_000  # Those of large models have a few thousand.
_CUSTOM_CODE_PHRASES = ("custom code", "trust_remote_code", "custom generation code")
# Arguments of `from_pretrained` that select the files.
_SOURCE_ARGUMENTS = ("cache_dir", "revision", "subfolder", "token", "local_files_only", "force_download")
_CUSTOM_GENERATE = "custom_generate/generate.py"
_GGUF_VERSION = (5, 23)  # Of transformers; earlier ones misread the BOS and EOS of GGUF tokenizers.


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Open a tokenizer from a folder, a file (tokenizer.json or GGUF), or the hub.

    Raises:
        InputError: If it needs custom code.
        Exception: Any error of the libraries, if something is missing or damaged.
    """
    with _without_code(name):
        tokenizer: PreTrainedTokenizerBase
        if is_gguf(name):
            tokenizer = _tokenizer_of_gguf(name)
        elif Path(name).is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=name)
        else:
            read_settings(Path(name) / "tokenizer_config.json")
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            except Exception as error:
                if Path(name).is_dir() and not any(map(_is_tokenizer_file, Path(name).iterdir())):
                    raise ValueError("it has no tokenizer files") from error
                raise
        _try_out(tokenizer)
        return tokenizer


def _is_tokenizer_file(file: Path) -> bool:
    return file.name.startswith(("tokenizer", "vocab")) or file.suffix == ".model"


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use a tokenizer once: the libraries notice settings of the wrong type only when they use them."""
    ids = tokenizer(["A word.", ""])["input_ids"]
    tokenizer.decode(ids[0], skip_special_tokens=True)
    if any(isinstance(token, bool) or token < 0 for token in tokenizer.get_vocab().values()):
        raise ValueError("a token has a negative id")


def open_config(name: str, **kwargs: Any) -> PreTrainedConfig:
    """Open the configuration of a model from a folder, a GGUF file or the hub.

    Args:
        name: Folder, GGUF file or hub name.
        **kwargs: Arguments of `from_pretrained` that select a version.

    Raises:
        InputError: If it needs custom code, or kernels from the hub.
        Exception: Any error of the libraries, if something is missing or damaged.
    """
    with _without_code(name):
        if is_gguf(name):
            return _config_of_gguf(name)
        read_settings(Path(name) / "config.json")
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False, **kwargs)
        _check_kernels(config, name)
        return config


def open_network(kind: Any, name: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Open a model; also returns the library's loading info.

    Args:
        kind: A class with `from_pretrained`.
        name: Folder, GGUF file or hub name.
        **kwargs: Arguments of `from_pretrained`.

    Raises:
        InputError: If it needs custom code, or kernels from the hub.
        Exception: Any error of the libraries, if something is missing or damaged.
    """
    if is_gguf(name):
        return _open_gguf(kind, name, **kwargs)
    open_config(name, **{option: value for option, value in kwargs.items() if option in _SOURCE_ARGUMENTS})
    if (Path(name) / _CUSTOM_GENERATE).exists():
        raise _custom_code_error(name, _CUSTOM_GENERATE)
    read_settings(Path(name) / "generation_config.json")
    with _without_code(name):
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            name, trust_remote_code=False, output_loading_info=True, **kwargs
        )
        return loaded


def _config_of_gguf(name: str) -> PreTrainedConfig:
    if tuple(map(int, transformers.__version__.split(".")[:2])) < _GGUF_VERSION:
        raise InputError(
            f"'{name}', a GGUF file, needs transformers {'.'.join(map(str, _GGUF_VERSION))} or newer, which "
            f"reads its tokenizer as it is; {transformers.__version__} is installed."
        )
    file = local_file(name)
    return copy.deepcopy(_read_gguf_config(file, file.stat().st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _read_gguf_config(file: Path, modified: int) -> PreTrainedConfig:
    """The configuration in a GGUF file; cached, since reading includes all tokens and takes seconds.

    Args:
        file: The file.
        modified: When it was last modified, so that another file at the same path is read again.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        str(file.parent), gguf_file=file.name, trust_remote_code=False
    )
    return config


def _tokenizer_of_gguf(name: str) -> PreTrainedTokenizerBase:
    file, size = local_file(name), _config_of_gguf(name).vocab_size
    tokenizer: Any = AutoTokenizer.from_pretrained(
        str(file.parent), gguf_file=file.name, trust_remote_code=False
    )
    if len(tokenizer) <= size:
        return tokenizer
    # Its class adds an unknown token, which is not in the model's vocabulary.
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < size]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        chat_template=tokenizer.chat_template,
        **{role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )


def _open_gguf(kind: Any, name: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    file = local_file(name)
    with _without_code(name):
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            config=_config_of_gguf(name),
            # Otherwise weights may stay quantized, and be computed with by kernels from the hub.
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
            output_loading_info=True,
            **kwargs,
        )
        return loaded


def base_of_adapters(path: Path) -> str:
    """The name of the base model of the adapters in a folder.

    Raises:
        InputError: If the folder names packages to import.
        Exception: Any error of peft, if something is damaged.
    """
    import peft  # noqa: PLC0415 (optional dependency)

    settings = read_settings(path / "adapter_config.json")
    if settings.get("megatron_config"):  # With it peft imports whatever megatron_core names.
        raise _custom_code_error(str(path), "megatron_config in adapter_config.json")
    return str(peft.PeftConfig.from_pretrained(str(path)).base_model_name_or_path)


def open_adapters(model: Any, path: Path) -> Any:
    """Wrap a model with the adapters in a folder, as a `peft.PeftModel`.

    Raises:
        InputError: If the folder lacks tensors of the adapters that it declares.
        Exception: Any error of peft, if something is damaged or does not fit.
    """
    import peft  # noqa: PLC0415 (optional dependency)

    with _without_code(str(path)):
        with ignore_peft_deprecations():
            adapted = peft.PeftModel.from_pretrained(model, str(path))
        # Whether peft would save embeddings does not matter here, and by default it would ask the hub.
        expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        stored = peft.load_peft_weights(str(path))
    if missing := sorted(expected.keys() - stored.keys()):  # peft warns at most.
        raise InputError(
            f"the adapters in '{path}' do not fit the model: {len(missing)} of their tensors are missing, "
            f"the first is {missing[0]}."
        )
    return adapted


@contextmanager
def ignore_peft_deprecations() -> Iterator[None]:
    """Silence transformers' warning that peft uses the old name of a model property."""
    with warnings.catch_warnings():
        old = "`is_gradient_checkpointing` is deprecated"
        warnings.filterwarnings("ignore", message=old, category=FutureWarning)
        yield


def read_settings(file: Path) -> dict[str, Any]:
    """Read a JSON file of settings; empty if there is no such file.

    Raises:
        InputError: If it is too long, cannot be read, or is not a JSON object.
    """
    try:
        if not file.is_file():
            return {}
        if (size := file.stat().st_size) > _MAX_SETTINGS_BYTES:
            raise InputError(
                f"'{file}' is too large for a settings file ({size:,} bytes); restore it from a copy."
            )
        values = json.loads(file.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{file}' is damaged ({reason_of(error)}); restore it from a copy.") from error
    if not isinstance(values, dict):
        raise InputError(f"'{file}' is damaged (it holds no settings); restore it from a copy.")
    return values


def may_run_code(error: BaseException) -> bool:
    """Whether torch refused to load a pickle that could run code."""
    text = str(error)
    return "weights_only" in text and ("Unsupported" in text or "unsupported" in text)


def _asking_hub(name: str) -> AbstractContextManager[None]:
    """Load inside the block from a folder, from the hub, or, without a network, from the hub's cache."""
    return nullcontext() if Path(name).exists() else hub_or_cache()


@contextmanager
def _without_code(name: str) -> Iterator[None]:
    """Ask the hub only briefly inside the block, and turn errors that offer to run code into one sentence."""
    try:
        with _asking_hub(name):
            yield
    except InputError:
        raise
    except Exception as error:
        if any(word in str(error) for word in _CUSTOM_CODE_PHRASES):
            raise _custom_code_error(name, "auto_map") from error
        if may_run_code(error):
            raise _pickle_error(name) from error
        raise
    except BaseException as error:  # A panic of the tokenizers library is not an Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(reason_of(error)) from error


def _custom_code_error(name: str, reason: str) -> InputError:
    return InputError(
        f"'{name}' needs custom code ({reason}), which calm never runs; use a version that the libraries can "
        "load without it."
    )


def _pickle_error(name: str) -> InputError:
    return InputError(
        f"'{name}' contains a pickle, which could run code, so it is not loaded; use safetensors instead."
    )


def _check_kernels(config: PreTrainedConfig, name: str) -> None:
    """Raise InputError if a configuration, or one nested in it, names an attention kernel from the hub."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    for part in parts:
        chosen = getattr(part, "_attn_implementation", None)
        for kernel in chosen.values() if isinstance(chosen, dict) else [chosen]:
            if isinstance(kernel, str) and "/" in kernel:
                raise _custom_code_error(name, f"the attention '{kernel}'")
