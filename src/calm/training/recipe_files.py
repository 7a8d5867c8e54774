"""Recipes as YAML: shipped ones by name, users' by path, written back beside the weights."""

import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse

from calm.errors import InputError
from calm.training.recipe import Recipe


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes inside the package."""
    folder = Path(str(resources.files("calm") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> str:
    """The path of a recipe given by path or by shipped name.

    Raises:
        InputError: If there is neither.
    """
    if Path(name).is_file():
        return name
    shipped = shipped_recipes()
    if name in shipped:
        return str(shipped[name])
    raise InputError(f"there is no recipe '{name}'; give a .yaml file or one of: {', '.join(shipped)}.")


def recipe_parser() -> jsonargparse.ArgumentParser:
    """A parser whose arguments are the fields of `Recipe`, dotted."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, sub_configs=False)
    return parser


def read_recipe(name: str) -> Recipe:
    """Read a recipe strictly: unknown keys and wrong types are errors.

    Raises:
        InputError: If there is no such recipe or it has a mistake.
    """
    parser = recipe_parser()
    try:
        values = parser.parse_path(find_recipe(name))
    except jsonargparse.ArgumentError as error:
        raise InputError(f"recipe '{name}': {error}") from error
    return Recipe(**vars(parser.instantiate(values)))


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
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
    parser = recipe_parser()
    try:
        return Recipe(**vars(parser.instantiate(parser.parse_object(values))))
    except jsonargparse.ArgumentError as error:
        raise InputError(f"settings {', '.join(settings)}: {error}") from error


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write all settings of a recipe, defaults included."""
    parser = recipe_parser()
    text = parser.dump(parser.parse_object(dataclasses.asdict(recipe)), skip_none=False)
    path.write_text(text, encoding="utf-8")


def differences(first: Recipe, second: Recipe) -> list[str]:
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
