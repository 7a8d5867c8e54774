"""What a run was begun with, kept in its folder: it goes on with the same or not at all."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calm.data.examples import Example
from calm.data.files import find_files, is_here
from calm.errors import InputError
from calm.storage.disk import read_json, write_file_whole

INPUTS = "inputs.json"


def check_inputs(output: Path, inputs: Mapping[str, str]) -> None:
    """Note what a run begins with, or compare it with what was noted.

    Args:
        output: Folder of the run.
        inputs: Digests by what they are of, as a message would call it.

    Raises:
        InputError: If something is not what it was.
    """
    file = output / INPUTS
    noted = inputs_in(output)
    for what, digest in inputs.items():
        if noted.get(what, digest) != digest:
            raise InputError(
                f"cannot resume '{output}': {what} changed since the run began. Put back what it was, or "
                "choose another output folder."
            )
    if inputs.keys() - noted.keys():
        write_file_whole(file, json.dumps({**noted, **inputs}, indent=1) + "\n")


def inputs_in(folder: Path) -> dict[str, str]:
    """What was noted in a folder; nothing in one of an earlier version.

    Raises:
        InputError: If it is damaged.
    """
    file = folder / INPUTS
    return read_json(file, dict) if file.exists() else {}


def copy_inputs(stage: Path, checkpoint: Path) -> None:
    """Note in a checkpoint what its run began with.

    Args:
        stage: The folder of the stage's checkpoints, in that of the run.
        checkpoint: Where a checkpoint is being written.
    """
    if (run := _run_of(stage)) is not None:
        shutil.copyfile(run / INPUTS, checkpoint / INPUTS)


def other_input(stage: Path, checkpoint: Path) -> str | None:
    """What the run of a checkpoint began with, and this one did not; None if there is nothing."""
    run = _run_of(stage)
    own, noted = {} if run is None else inputs_in(run), inputs_in(checkpoint)
    return next((what for what in noted if own.get(what, noted[what]) != noted[what]), None)


def _run_of(stage: Path) -> Path | None:
    """The folder of the run that a stage is of, if that has noted its inputs."""
    return next((folder for folder in stage.parents[:2] if (folder / INPUTS).is_file()), None)


def digest_of_recipe(recipe: Any) -> str:
    """A digest of the settings that are not the defaults, so that new settings change nothing."""

    def changed(value: Any, default: Any) -> Any:
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            pairs = {name: changed(getattr(value, name), getattr(default, name)) for name in names}
            return {name: pair for name, pair in pairs.items() if pair != {}}
        return {} if value == default else [value]

    return _digest(changed(recipe, type(recipe)()))


def digest_of_weights(model: nn.Module) -> str:
    """A digest of the names, types and values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_examples(parts: Iterable[Iterable[Example]]) -> str:
    """A digest of the tokens of prompts and completions."""
    tokens = [[[*map(int, one.prompt)], [*map(int, one.completion)]] for part in parts for one in part]
    return _digest(tokens)


def digest_of_files(sources: Iterable[str]) -> str:
    """A digest of the names and lengths of files: what is streamed is too much to be read first."""
    files = [file for source in sources if is_here(source) for file in find_files(Path(source))]
    return _digest([[file.name, file.stat().st_size] for file in files])


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
