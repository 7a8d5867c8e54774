"""Recipes as YAML: shipped ones by name, users' by path, written back beside the weights."""

import dataclasses
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
