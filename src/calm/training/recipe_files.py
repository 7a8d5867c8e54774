"""Recipes as YAML: shipped ones by name, users' by path, written back beside the weights."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from calm.errors import InputError
from calm.mistakes import Options, mistake_in, sentence, types_of
from calm.storage.folders import (
    check_output,
    check_spared,
    discard_replaced,
    emptied,
    new_folder,
    restore,
    work_of,
)
from calm.storage.locks import LOCK, locked
from calm.storage.ours import FINETUNED, TRAINED, FolderKind
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.processes import processes
from calm.training.recipe import Recipe
from calm.training.recipe_settings import RECIPE, recipe_parser, settings_in

_REPLACED: dict[type, FolderKind] = {Recipe: TRAINED, FinetuningRecipe: FINETUNED}
DATA = "data"  # The prepared text of a run, in its folder.
_KEPT = (LOCK, work_of(Path(DATA)).name)  # What stays where a folder is emptied for a run.
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | FinetuningRecipe)


def read_recipe(name: str) -> Recipe:
    """`read_recipe_of` a model that is trained."""
    return read_recipe_of(Recipe, name)


def read_recipe_of(kind: type[AnyRecipe], name: str) -> AnyRecipe:
    """Read a recipe strictly: unknown keys and wrong types are errors.

    Raises:
        InputError: If there is no such recipe or it has a mistake.
    """
    parser = recipe_parser(kind)
    options = Options(types_of(kind))
    settings = settings_in(name, kind, options)
    try:
        values = parser.parse_object(settings)
    except jsonargparse.ArgumentError as error:
        raise InputError(f"recipe '{name}': {sentence(str(error), options)}") from error
    return kind(**vars(parser.instantiate(values)))


def with_settings(recipe: AnyRecipe, settings: Mapping[str, Any]) -> AnyRecipe:
    """A recipe with some settings changed.

    Args:
        recipe: The recipe.
        settings: Dotted names and their values, such as {"language_model.head.alpha": 0.5}.

    Raises:
        InputError: If there is no such setting, or it cannot have that value.
    """
    values = dataclasses.asdict(recipe)
    for name, value in settings.items():
        *path, last = name.split(".")
        place: Any = values
        for part in path:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise InputError(f"a recipe has no setting '{name}'.")
        place[last] = value
    parser, kind = recipe_parser(type(recipe)), type(recipe)
    options, where = Options(types_of(kind)), f"settings {', '.join(settings)}"
    if (mistake := mistake_in(values, options)) is not None:
        raise InputError(f"{where}: {mistake}")
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(values))))
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{where}: {sentence(str(error), options)}") from error


def write_recipe(recipe: Recipe | FinetuningRecipe, path: Path) -> None:
    """Write all settings of a recipe, defaults included."""
    parser = recipe_parser(type(recipe))
    text = parser.dump(parser.parse_object(dataclasses.asdict(recipe)), skip_none=False)
    path.write_text(text, encoding="utf-8")


def differences(first: AnyRecipe, second: AnyRecipe) -> list[str]:
    """Dotted names of the settings in which two recipes differ."""

    def walk(a: Any, b: Any, name: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [
                d
                for key in sorted(a.keys() | b.keys())
                for d in walk(a.get(key), b.get(key), f"{name}.{key}")
            ]
        return [] if a == b else [name.lstrip(".")]

    return walk(dataclasses.asdict(first), dataclasses.asdict(second), "")


def check_run_folder(
    recipe: Recipe | FinetuningRecipe,
    output: Path,
    resume: bool,
    overwrite: bool,
    needed: Sequence[str] = (),
) -> None:
    """See that a run can begin in a folder, or go on there; nothing is changed.

    Args:
        recipe: The recipe.
        output: The folder.
        resume: Whether a run goes on there.
        overwrite: Whether what is there may be removed.
        needed: Paths, or names of other kinds, of what the run reads.

    Raises:
        InputError: If the folder is not empty, holds what the run needs, there is nothing to go on with, or
            that has another recipe.
    """
    if not resume:
        check_spared(output, needed)
        check_output(output, _REPLACED[type(recipe)] if overwrite else None, _KEPT)
    elif (output / RECIPE).is_file():
        changed = differences(read_recipe_of(type(recipe), str(output / RECIPE)), recipe)
        if changed:
            raise InputError(
                f"cannot resume '{output}': the recipe differs in {', '.join(changed)}; "
                f"use the recipe in {output / RECIPE}, or another output folder."
            )
    else:
        raise InputError(f"there is no run to resume in '{output}' (no {RECIPE}); leave out --resume.")


@contextlib.contextmanager
def held_run_folder(
    recipe: Recipe | FinetuningRecipe,
    output: Path,
    resume: bool,
    overwrite: bool,
    needed: Sequence[str] = (),
) -> Iterator[None]:
    """A folder that can take a run, or go on with one, and that no other process works in meanwhile.

    What a killed command has moved aside there is put back first. The arguments are those of
    `check_run_folder`.

    Raises:
        InputError: As `check_run_folder`, or if another process is at work there.
    """
    if not processes().is_main_process:
        yield
        return
    if not output.is_dir():
        check_run_folder(recipe, output, resume, overwrite, needed)
    with new_folder(output), locked(output / LOCK, f"the run '{output}'"):
        if not (resume and (output / RECIPE).is_file()):
            restore(output, _KEPT)
        check_run_folder(recipe, output, resume, overwrite, needed)
        yield


@contextlib.contextmanager
def opened_run_folder(recipe: Recipe | FinetuningRecipe, output: Path, resume: bool) -> Iterator[None]:
    """The folder of a run with its recipe in it, for the block that makes the run ready.

    What was there before goes when that has ended well. Otherwise the folder is as it was, but for work on
    text that is kept there.
    """
    if resume:
        yield
        discard_replaced(output)
        return
    with emptied(output, _KEPT):
        write_recipe(recipe, output / RECIPE)
        yield
    shutil.rmtree(work_of(output / DATA), ignore_errors=True)
