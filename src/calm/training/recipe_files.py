"""Recipes as YAML: shipped ones by name, others by path; written next to the weights."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from calm.errors import InputError
from calm.mistakes import Options, explain, mistake_in, types_of
from calm.storage.disk import write_atomically
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import Effect, Recipe, effect_of
from calm.training.recipe_settings import RECIPE as RECIPE
from calm.training.recipe_settings import override_settings, recipe_with, settings_in

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | FinetuningRecipe)


def read_recipe(name: str) -> Recipe:
    """`read_recipe_of` for recipes of `calm train`."""
    return read_recipe_of(Recipe, name)


def read_recipe_of(kind: type[AnyRecipe], name: str) -> AnyRecipe:
    """Read a recipe strictly: unknown keys and wrong types are errors.

    Raises:
        InputError: If there is no such recipe or it has a mistake.
    """
    options = Options(types_of(kind))
    settings = settings_in(name, kind, options)
    return _build(kind, settings, f"recipe '{name}'", options)


def with_settings(recipe: AnyRecipe, settings: Mapping[str, Any]) -> AnyRecipe:
    """A recipe with some settings changed, as by a recipe that extends it.

    Args:
        recipe: The recipe.
        settings: Dotted names and their values, such as {"language_model.head.alpha": 0.5}. If they change
            the kind of a component, its other settings are dropped (`calm.training.recipe_settings.KINDS`).

    Raises:
        InputError: If there is no such setting, or it cannot have that value.
    """
    values = dataclasses.asdict(recipe)
    for name in settings:
        group: Any = values
        for part in name.split(".")[:-1]:
            group = group.get(part) if isinstance(group, dict) else None
        if not isinstance(group, dict):
            raise InputError(f"a recipe has no setting '{name}'.")
    kind = type(recipe)
    return _check_and_build(
        kind, override_settings(values, settings, kind), f"settings {', '.join(settings)}"
    )


def check_types(recipe: Recipe | FinetuningRecipe) -> None:
    """Check the types of all settings, which may be wrong in a recipe made in Python.

    Raises:
        InputError: If one is wrong.
    """
    _check_and_build(type(recipe), dataclasses.asdict(recipe), "recipe")


def _check_and_build(kind: type[AnyRecipe], values: dict[str, Any], label: str) -> AnyRecipe:
    options = Options(types_of(kind))
    if (mistake := mistake_in(values, options)) is not None:
        raise InputError(f"{label}: {mistake}")
    return _build(kind, values, label, options)


def _build(kind: type[AnyRecipe], values: dict[str, Any], label: str, options: Options) -> AnyRecipe:
    try:
        recipe: AnyRecipe = recipe_with(kind, values)
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{label}: {explain(str(error), options)}") from error
    return recipe


def recipe_text(recipe: Recipe | FinetuningRecipe) -> str:
    """All settings of a recipe as YAML, defaults included."""
    text: str = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
    return text


def write_recipe(recipe: Recipe | FinetuningRecipe, path: Path) -> None:
    """Write all settings of a recipe, defaults included."""
    write_atomically(path, recipe_text(recipe))


def differences(first: AnyRecipe, second: AnyRecipe, effect: Effect = "full") -> list[str]:
    """Dotted names of the settings that differ between two recipes and have that effect on the result."""

    def settings_of(value: Any, name: str, setting_effect: Effect) -> Iterator[tuple[str, Any]]:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from settings_of(
                    getattr(value, field.name), f"{name}.{field.name}", effect_of(field, second)
                )
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from settings_of(item, f"{name}.{key}", setting_effect)
        elif setting_effect == effect:
            yield name.lstrip("."), value

    a, b = (dict(settings_of(recipe, "", "full")) for recipe in (first, second))
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
