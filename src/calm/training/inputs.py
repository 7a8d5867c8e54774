"""Digests of a run's inputs: it resumes with the same inputs or not at all."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calm.data.examples import Example
from calm.data.shards import files_of
from calm.errors import InputError
from calm.storage.disk import read_json, write_atomically
from calm.training.extending import without_last_steps
from calm.training.recipe import effect_of

INPUTS = "inputs.json"
RECIPE_INPUT = "its recipe"


def check_inputs(
    output: Path, inputs: Mapping[str, str], earlier: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Record the inputs of a run, or compare them with those on record.

    Args:
        output: Folder of the run.
        inputs: Digests; each key describes the input in the words of an error message.
        earlier: Digests that earlier versions would have recorded instead, which are accepted as well.

    Raises:
        InputError: If an input has changed.
    """
    recorded = inputs_in(output)
    for name, digest in inputs.items():
        if recorded.get(name, digest) not in (digest, *(earlier or {}).get(name, ())):
            raise InputError(
                f"cannot resume '{output}': {name} changed since the run began. Restore the original, or "
                "choose another output folder."
            )
    if inputs.keys() - recorded.keys():
        write_atomically(output / INPUTS, json.dumps({**recorded, **inputs}, indent=1) + "\n")


def inputs_in(folder: Path) -> dict[str, str]:
    """The inputs on record in a folder; empty for a run of an earlier version.

    Raises:
        InputError: If it is damaged.
    """
    file = folder / INPUTS
    return read_json(file, dict) if file.exists() else {}


def copy_inputs(stage: Path, checkpoint: Path) -> None:
    """Copy the record of a run's inputs into a checkpoint.

    Args:
        stage: Folder of the stage's checkpoints, inside the run's folder.
        checkpoint: Where a checkpoint is being written.
    """
    if (run := _run_of(stage)) is not None:
        shutil.copyfile(run / INPUTS, checkpoint / INPUTS)


def changed_input(stage: Path, checkpoint: Path) -> str | None:
    """An input that differs between a checkpoint's run and this one; None if all are the same.

    Args:
        stage: Folder of the stage's checkpoints, inside the run's folder.
        checkpoint: The checkpoint.
    """
    run = _run_of(stage)
    current = {} if run is None else inputs_in(run)
    recorded = inputs_in(checkpoint).items()
    return next((name for name, digest in recorded if current.get(name, digest) != digest), None)


def _run_of(stage: Path) -> Path | None:
    """The folder of a stage's run, if its inputs are on record."""
    return next((folder for folder in stage.parents[:2] if (folder / INPUTS).is_file()), None)


def check_recipe_and_inputs(output: Path, recipe: Any, inputs: Mapping[str, str]) -> None:
    """`check_inputs` for a recipe (except the steps of its last stage) and all other inputs of the run."""
    extensible = without_last_steps(recipe)
    digest = digest_of_recipe(extensible)
    earlier = [
        digest_of_recipe(extensible, all_settings=True),
        digest_of_recipe(recipe, all_settings=True),
        digest_of_recipe(recipe, all_settings=True, sort_keys=False),
    ]
    check_inputs(output, {RECIPE_INPUT: digest, **inputs}, {RECIPE_INPUT: earlier})


def digest_of_recipe(recipe: Any, *, all_settings: bool = False, sort_keys: bool = True) -> str:
    """A digest of the settings that differ from the defaults, so that adding a setting changes no digest.

    Settings that do not affect the result, or only its rounding, are left out.

    Args:
        recipe: The recipe.
        all_settings: Include all settings but the trackers, as earlier versions did.
        sort_keys: Sort the keys of dictionaries such as the head's, whose order does not matter. Earlier
            versions kept the order in runs started from Python.
    """

    def is_included(field: dataclasses.Field) -> bool:
        return field.name != "report_to" if all_settings else effect_of(field, recipe) == "full"

    def changes(value: Any, default: Any) -> Any:
        """Nested dictionaries of what differs; each value in a list, so that {} always means no change."""
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value) if is_included(field)]
            groups = {name: changes(getattr(value, name), getattr(default, name)) for name in names}
            return {name: changed for name, changed in groups.items() if changed != {}}
        return {} if value == default else [_sorted(value) if sort_keys else value]

    return _digest(changes(recipe, type(recipe)()))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def digest_of_weights(model: nn.Module) -> str:
    """A digest of the names, dtypes, shapes and values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_examples(examples: Iterable[Example]) -> str:
    """A digest of the tokens of prompts, completions and, if there are any, steps."""
    return _digest(
        [
            [[*map(int, ids)] for ids in (example.prompt, example.completion, *example.steps)]
            for example in examples
        ]
    )


def digest_of_files(sources: Iterable[str]) -> str:
    """A digest of the names and sizes of files; streamed text is too large to read in advance."""
    files = [file for source in sources for file in files_of(source)]
    return _digest([[file.name, file.stat().st_size] for file in files])


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
