"""A model folder -> a smaller copy, or a repository on the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from calm.errors import InputError, RunError, reason_of
from calm.hub.connection import is_hub_name, why_unreachable
from calm.models.loading import load_language_model_and_tokenizer
from calm.sharing.card import CARD, recipe_text
from calm.storage.disk import write_atomically
from calm.storage.folders import atomic_folder, check_output
from calm.training.recipe_files import RECIPE


def check_export(target: Path | None, dtype: str) -> None:
    """Check in advance whether a model can be copied.

    Args:
        target: Folder to write; None checks only the dtype.
        dtype: Dtype of the weights.

    Raises:
        InputError: If the target exists or cannot be a folder, or the dtype is not supported.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be float32, bfloat16 or float16, got '{dtype}'.")
    if target is None:
        return
    if target.exists():
        raise InputError(f"'{target}' already exists; choose another --export or move it away.")
    check_output(target, None)


def export(folder: Path, target: Path, dtype: str) -> None:
    """Copy a model folder with its card, converting the weights to another dtype.

    The copy still loads in float32: the dtype is that of the file, not of the computation.

    Args:
        folder: The model folder.
        target: Folder to write.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        InputError: If the target exists, or the dtype is not one of these.
    """
    check_export(target, dtype)
    model, tokenizer = load_language_model_and_tokenizer(str(folder))
    with atomic_folder(target) as partial:
        torch.nn.Module.to(model, getattr(torch, dtype))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        write_atomically(partial / "config.json", json.dumps(_in_float32(config), indent=2) + "\n")
        shutil.copyfile(folder / CARD, partial / CARD)
        write_atomically(partial / RECIPE, recipe_text(folder / RECIPE))


def _in_float32(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those nested in it, with dtype float32 and without local folder names."""
    nested = {
        name: _in_float32(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != "_name_or_path"
    }
    return nested | ({"dtype": "float32"} if "dtype" in config else {})


def check_push(repository: str) -> None:
    """Check in advance whether a model can be uploaded.

    Args:
        repository: "owner/name".

    Raises:
        InputError: If it is not such a name.
        RunError: If the hub cannot be reached.
    """
    if "/" not in repository or not is_hub_name(repository):
        raise InputError(f"'{repository}' is not a repository name on the hub; give OWNER/NAME.")
    if (reason := why_unreachable()) is not None:
        raise RunError(f"'{repository}' could not be uploaded ({reason}); check the network and try again.")


def push(folder: Path, repository: str, *, is_private: bool) -> str:
    """Upload a model folder to the hub.

    Args:
        folder: The model folder, with its card.
        repository: "owner/name"; created if it does not exist.
        is_private: Whether a new repository is private.

    Returns:
        The URL of the model.

    Raises:
        InputError: If it is not such a name.
        RunError: If the hub cannot be reached or refuses the upload.
    """
    check_push(repository)
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=is_private, exist_ok=True)
        message = "A model of calm"
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=[RECIPE]
        )
        recipe = recipe_text(folder / RECIPE).encode()
        hub.upload_file(
            path_or_fileobj=recipe, path_in_repo=RECIPE, repo_id=repository, commit_message=message
        )
    except Exception as error:  # From the network, the hub, or the name.
        raise RunError(
            f"'{repository}' could not be uploaded ({reason_of(error)}); log in with `hf auth login` and run "
            "the same command again to resume."
        ) from error
    return str(address)
