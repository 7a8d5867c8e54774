"""Recipes as YAML: shipped ones by name, others by path; written back with the weights."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from calm.errors import InputError, reason_of
from calm.mistakes import Options, mistake_in, sentence, types_of
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import Recipe

RECIPE = "recipe.yaml"
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | FinetuningRecipe)
_FOLDERS: dict[type, str] = {Recipe: "recipes", FinetuningRecipe: "recipes/finetuning"}


def shipped_recipes(kind: type = Recipe) -> dict[str, Path]:
    """Name -> file of the recipes of a kind inside the package."""
    folder = Path(str(resources.files("calm") / _FOLDERS[kind]))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str, kind: type = Recipe) -> str:
    """The path of a recipe given by path or by shipped name.

    Raises:
        InputError: If there is neither.
    """
    if Path(name).is_file():
        return name
    shipped = shipped_recipes(kind)
    if name in shipped:
        return str(shipped[name])
    inside = Path(name, RECIPE)
    near = [str(inside)] if inside.is_file() else difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise InputError(f"there is no recipe '{name}'; give a .yaml file or one of: {', '.join(shipped)}{hint}")


def recipe_parser(kind: type = Recipe) -> jsonargparse.ArgumentParser:
    """A parser whose arguments are the dotted names of a recipe's settings."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, sub_configs=False)
    return parser


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


def settings_in(name: str, kind: type, options: Options) -> dict[str, Any]:
    """The settings in the file of a recipe: such as there are, in groups, of whatever types.

    Args:
        name: A path or a shipped name.
        kind: The kind of recipe.
        options: Which settings there are.

    Raises:
        InputError: If there is none, it cannot be read, is no YAML, or has other settings.
    """
    path = find_recipe(name, kind)
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = jsonargparse.get_loader("yaml")(text)  # Unlike YAML itself, it reads 1e-3 as a number,
        if not isinstance(values, dict):  # but a mapping in which nothing has a value as text.
            values = yaml.safe_load(text)
        json.dumps(values, default=str)  # What names itself as a part of itself has no end.
    except OSError as error:
        raise InputError(f"the recipe '{path}' cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe '{path}' is not UTF-8; save it as such.") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"the recipe '{path}' is no YAML{_place_and_problem(error)}.") from error
    if not isinstance(values, dict):
        raise InputError(f"the recipe '{path}' holds no settings; write them as 'name: value'.")
    if (mistake := mistake_in(values, options)) is not None:
        raise InputError(f"recipe '{name}': {mistake}")
    return values


def _place_and_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f" (line {error.problem_mark.line + 1}: {error.problem})"
    return f" ({reason_of(error)})"


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
    """Dotted names of the settings that differ between two recipes."""

    def walk(a: Any, b: Any, name: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [
                d
                for key in sorted(a.keys() | b.keys())
                for d in walk(a.get(key), b.get(key), f"{name}.{key}")
            ]
        return [] if a == b else [name.lstrip(".")]

    return walk(dataclasses.asdict(first), dataclasses.asdict(second), "")
