"""Find a model by name; if there is none, say which models there are and which was probably meant.

This file imports neither torch nor transformers, so that a mistyped name is reported at once.
"""

import difflib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache

from calm.errors import InputError
from calm.extras import require
from calm.hub.connection import is_hub_name, may_be_on_hub, why_unreachable
from calm.hub.gguf import as_hub_file, is_gguf
from calm.models.shipped import MODEL_FILES, folder_of, shipped_models
from calm.storage.disk import expand_user

_MAX_NAMED = 3
_MAX_COMPARED = 50
_MAX_FOLDERS = 300  # To search.
_MAX_ENTRIES = 1000  # To look at in each folder.
_DEPTH = 3  # Deep enough for runs/NAME/model.
_SKIPPED = ("autoencoder", "checkpoints", "data")  # Parts of a run that are not searched.


def resolve_name(name: str) -> str:
    """Resolve a name to a model's folder, its GGUF file, or a name to look up on the hub.

    Raises:
        InputError: If it is none of these, or GGUF files cannot be read here.
    """
    if is_gguf(name):
        return _resolve_gguf(name)
    try:
        path = folder_of(name)
        is_folder, is_file = Path(path).is_dir(), Path(path).is_file()
    except OSError as error:  # Not readable, or the name is too long.
        raise InputError(f"cannot load '{name}': {error.strerror}.") from error
    if is_folder and name.strip():
        return path
    if not name.strip() or is_file or not may_be_on_hub(name):
        raise InputError(no_such_folder(name))
    return path


def _resolve_gguf(name: str) -> str:
    require(f"'{name}', a GGUF file,", "gguf")
    file, hub_file = expand_user(name), as_hub_file(name)
    if file.is_file():
        return str(file)
    if hub_file is not None and may_be_on_hub(hub_file.repository):
        return name
    raise InputError(
        f"cannot load '{name}': there is no such file; name a file on the hub as owner/name/file.gguf."
    )


def check_model_exists(name: str) -> None:
    """Check that a model is on this machine, the hub's cache included, or that the hub can be reached.

    Raises:
        InputError: If none of these is the case.
    """
    if Path(resolve_name(name)).exists() or _is_cached(name):
        return
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why_unreachable()
    if reason is not None:
        raise InputError(not_loaded_from_hub(name, reason))


def _is_cached(name: str) -> bool:
    """Whether a hub model is in the local cache."""
    hub_file = as_hub_file(name)
    files = [(name, file) for file in MODEL_FILES] if hub_file is None else [hub_file]
    return any(isinstance(try_to_load_from_cache(*file), str) for file in files)


def no_such_folder(name: str) -> str:
    """Error message for a name that is not a folder here and is not looked up on the hub."""
    if not name.strip():
        return f"the model name is empty{nearby_models_hint(name)}"
    if expand_user(name).is_file():
        return f"cannot load '{name}': it is a file; give the folder it is in."
    owner = name.partition("/")[0]
    reason = f" (the hub was not queried, as '{owner}' is a local folder)" if is_hub_name(name) else ""
    return f"cannot load '{name}': there is no such folder{reason}{nearby_models_hint(name)}"


def not_loaded_from_hub(name: str, reason: str) -> str:
    """Error message for a name that is not a folder here and could not be loaded from the hub."""
    problem = "it is not a local folder, and it could not be loaded from the hub"
    return f"cannot load '{name}': {problem} ({reason.rstrip('.')}){nearby_models_hint(name)}"


def no_model_in(folder: str) -> str:
    """Error message for a folder without a model."""
    if (Path(folder) / "recipe.yaml").is_file():
        return f"'{folder}' is a run with an unfinished model (no model/config.json); continue with --resume."
    inside = [path.as_posix() for path in islice(_model_folders(Path(folder)), _MAX_NAMED)]
    hint = f"there is one in {' and '.join(inside)}" if inside else "check the path"
    return f"there is no model in '{folder}' (no config.json); {hint}."


def nearby_models_hint(name: str) -> str:
    """End of an error message: shipped models, models in nearby folders, and the closest match."""
    near = [folder.as_posix() for folder in islice(_model_folders(_deepest_folder(name)), _MAX_COMPARED)]
    shipped = list(shipped_models())
    known = [*(f"{model} (in the package)" for model in shipped), *near[:_MAX_NAMED]]
    # The user may have named a run instead of the model inside.
    models = {model.removesuffix("/model"): model for model in near}
    models |= {model: model for model in shipped + near}
    closest = difflib.get_close_matches(Path(name).as_posix(), models, n=1, cutoff=0.7)
    nearby = f"; models nearby: {', '.join(known)}" if known else ""
    return f"{nearby}; did you mean '{models[closest[0]]}'?" if closest else f"{nearby}."


def _deepest_folder(name: str) -> Path:
    """Deepest existing parent of a path; the current folder if that is only the root."""
    for parent in expand_user(name).parents:
        if parent.is_dir() and parent != Path(parent.anchor):
            return parent
    return Path()


def models_in(folder: Path) -> list[Path]:
    """Folders of language models below a folder, nearest first, at most `_MAX_FOLDERS`.

    Raises:
        InputError: If there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}'.")
    return list(islice(_model_folders(folder), _MAX_FOLDERS))


def _model_folders(start: Path) -> Iterator[Path]:
    """Folders of language models below a folder, nearest first."""
    level, searched = [start], 0
    for _ in range(_DEPTH):
        deeper = []
        for folder in level[: _MAX_FOLDERS - searched]:
            for inner in _folders_in(folder):
                if _is_language_model(inner):
                    yield inner
                else:
                    deeper.append(inner)
        searched += len(level)
        level = deeper


def _folders_in(folder: Path) -> list[Path]:
    try:
        entries = sorted(islice(folder.iterdir(), _MAX_ENTRIES))
        return [e for e in entries if e.is_dir() and e.name not in _SKIPPED and not e.name.startswith(".")]
    except OSError:  # Not readable.
        return []


def _is_language_model(folder: Path) -> bool:
    config = settings_of_model(folder)
    return (
        bool({"model_type", "peft_type"} & config.keys()) and config.get("model_type") != "calm_autoencoder"
    )


def settings_of_model(folder: Path) -> dict[str, Any]:
    """The configuration of a model or of adapters as a dict; empty if it cannot be read."""
    for file in MODEL_FILES:
        try:
            config = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # The last is from deeply nested brackets.
            continue
        return config if isinstance(config, dict) else {}
    return {}
