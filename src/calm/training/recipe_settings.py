"""Read the settings of a recipe, and of the recipes that it extends.

    extends: demo                 # a shipped recipe, or a path relative to this file, such as ../base.yaml
    language_model: {num_layers: 8}

A recipe that extends another inherits all of its settings, except those that it sets itself. Settings are
replaced one by one, unless one changes the kind of a component (`KINDS`): then that component is replaced as
a whole, since the fields of one kind mean nothing to another. Options, and settings given by name, override a
recipe in the same way.
"""

import copy
import dataclasses
import difflib
import functools
import itertools
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from calm.errors import InputError, reason_of
from calm.mistakes import Options, explain, mistake_in
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import Recipe

RECIPE = "recipe.yaml"
EXTENDS = "extends"
# A setting that chooses a kind -> the settings that only make sense for that kind. They are dropped when
# another kind is chosen.
KINDS = {
    "model": ("autoencoder", "language_model.head"),
    "autoencoder.kind": ("autoencoder",),
    "language_model.head.head_type": ("language_model.head",),
    "autoencoder.training.optimizer.name": ("autoencoder.training.optimizer.extra",),
    "language_model.training.optimizer.name": ("language_model.training.optimizer.extra",),
    "training.optimizer.name": ("training.optimizer.extra",),
}
_FOLDERS: dict[type, str] = {Recipe: "recipes", FinetuningRecipe: "recipes/finetuning"}
_COMMANDS: dict[type, str] = {Recipe: "calm train", FinetuningRecipe: "calm finetune"}
# Settings that only one kind of recipe has.
_UNIQUE_SETTINGS: dict[type, set[str]] = {
    Recipe: {"data", "autoencoder", "language_model"},
    FinetuningRecipe: {"examples", "lora", "answers"},
}


def shipped_recipes(kind: type = Recipe) -> dict[str, Path]:
    """Name -> file of the recipes of a kind inside the package."""
    folder = Path(str(resources.files("calm") / _FOLDERS[kind]))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def about_recipe(path: Path) -> str:
    """A recipe's description of itself: the comment at its top, as one line."""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines()
    )
    return " ".join(line.removeprefix("#").strip() for line in lines)


def find_recipe(name: str, kind: type = Recipe) -> str:
    """The path of a recipe given by path or by shipped name.

    Raises:
        InputError: If there is no such recipe.
    """
    if Path(name).is_file():
        return name
    shipped = shipped_recipes(kind)
    if name in shipped:
        return str(shipped[name])
    inside = Path(name, RECIPE)
    guesses = [str(inside)] if inside.is_file() else difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean '{guesses[0]}'?" if guesses else "."
    raise InputError(f"there is no recipe '{name}'; give a .yaml file or one of: {', '.join(shipped)}{hint}")


def kind_of_recipe(name: str) -> type:
    """The kind of a recipe given by path or by shipped name, inferred from its settings and what it extends.

    `Recipe` if that is not enough: reading it as one will say what is wrong.

    Raises:
        InputError: If there is no such recipe, or a file cannot be read.
    """
    shipped = {name: kind for kind in _FOLDERS for name in shipped_recipes(kind)}
    if not _is_file(Path(name)) and name in shipped:
        return shipped[name]
    path, visited = Path(find_recipe(name)), set[Path]()
    while _is_file(path) and path.resolve() not in visited:
        visited.add(path.resolve())
        settings = _settings_of_file(path)
        kinds = [kind for kind, names in _UNIQUE_SETTINGS.items() if settings.keys() & names]
        parent = str(settings.get(EXTENDS, ""))
        if kinds or parent in shipped:
            return kinds[0] if kinds else shipped[parent]
        path = path.parent / parent
    return Recipe


@dataclasses.dataclass(frozen=True)
class _CacheKey:
    """Settings that are compared and hashed by their text."""

    text: str
    settings: dict[str, Any] = dataclasses.field(compare=False)


def recipe_with(kind: type, settings: dict[str, Any]) -> Any:
    """A recipe of that kind with some settings, in nested groups, and defaults for the rest.

    Raises:
        jsonargparse.ArgumentError: If a setting is unknown or of the wrong type.
    """
    return kind(**vars(_parser(kind).instantiate(_parse(kind, settings))))


def _parse(kind: type, settings: dict[str, Any]) -> jsonargparse.Namespace:
    # Cached, since this takes a tenth of a second, and a command parses the settings of its run five times.
    return copy.deepcopy(_parsed(kind, _CacheKey(repr(settings), settings)))


@functools.lru_cache(maxsize=64)
def _parsed(kind: type, key: _CacheKey) -> jsonargparse.Namespace:
    return _parser(kind).parse_object(key.settings)


@functools.lru_cache
def _parser(kind: type) -> jsonargparse.ArgumentParser:
    """A parser whose arguments are the fields of a recipe of that kind, dotted."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, sub_configs=False)
    return parser


def settings_in(name: str, kind: type, options: Options) -> dict[str, Any]:
    """The settings of a recipe, including those of the recipes that it extends, in nested groups.

    Settings that none of the files mention are left out.

    Args:
        name: A path or a shipped name.
        kind: The kind of recipe.
        options: The settings that exist.

    Raises:
        InputError: If there is no such recipe, or if one of the files cannot be read, is not YAML, has an
            unknown setting or a value of the wrong type, or extends itself. The message names that file.
    """
    files: dict[Path, str] = {}  # File -> label for messages, the recipe first.
    layers: list[dict[str, Any]] = []  # The settings of each file.
    path, label = Path(find_recipe(name, kind)), name
    while True:
        if path.resolve() in files:
            chain = " -> ".join([*files.values(), label])
            raise InputError(f"recipe '{name}' extends itself ({chain}); remove one '{EXTENDS}'.")
        files[path.resolve()] = label
        settings = _settings_of_file(path)
        is_last, parent = EXTENDS not in settings, settings.pop(EXTENDS, None)
        _check(settings, label, kind, options)
        layers.append(settings)
        if is_last:
            break
        path = _parent(parent, path, label, kind)
        label = parent if path == shipped_recipes(kind).get(parent) else str(path)
    return functools.reduce(
        lambda base, overrides: override_settings(base, overrides, kind), reversed(layers)
    )


def recipe_file_of_run(folder: Path) -> Path:
    """The recipe file of a run.

    Raises:
        InputError: If there is no run in that folder.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise InputError(f"there is no run to resume in '{folder}' (no {RECIPE}); leave out --resume.")
    return path


def override_settings(base: Mapping[str, Any], overrides: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The settings of a recipe with some of them overridden, as by a recipe that extends it.

    Args:
        base: The settings of the recipe, in nested groups.
        overrides: The settings that override it, in nested groups or with dotted names.
        kind: The kind of recipe.
    """
    overrides = _in_groups(overrides)
    return _merge(compatible_settings(base, overrides, kind), overrides)


def compatible_settings(base: Mapping[str, Any], overrides: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The settings of a recipe that still mean something if others override it.

    If they change the kind of a component, its settings are left out. Arguments are those of `extended`.
    """
    overrides = _in_groups(overrides)
    settings = copy.deepcopy(dict(base))
    defaults = dataclasses.asdict(kind())
    for name, dependents in KINDS.items():
        old, new = _value(base, name, _value(defaults, name)), _value(overrides, name)
        if new is not None and new != old:
            for dependent in dependents:
                _remove(settings, dependent)
    return settings


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Override settings in place, group by group."""
    for name, value in overrides.items():
        are_groups = isinstance(base.get(name), dict) and isinstance(value, Mapping)
        base[name] = _merge(base[name], value) if are_groups else value
    return base


def _value(settings: Any, name: str, default: Any = None) -> Any:
    """The value of a dotted name in nested groups, or `default` if it is not set."""
    for part in name.split("."):
        if not isinstance(settings, Mapping) or part not in settings:
            return default
        settings = settings[part]
    return settings


def _remove(settings: dict[str, Any], name: str) -> None:
    """Remove a dotted name from nested groups, if it is there."""
    group, _, last = name.rpartition(".")
    container = _value(settings, group) if group else settings
    if isinstance(container, dict):
        container.pop(last, None)


def _parent(parent: Any, path: Path, label: str, kind: type) -> Path:
    """The file of the recipe that a file extends."""
    if not isinstance(parent, str) or not parent.strip():
        got = "null" if parent is None else f"'{parent}'"
        raise InputError(
            f"recipe '{label}': {EXTENDS} must be the name of a shipped recipe or a path, got {got}."
        )
    shipped = shipped_recipes(kind)
    if parent in shipped:
        return shipped[parent]
    relative = path.parent / parent
    if _is_file(relative):
        return relative
    for other, command in _COMMANDS.items():
        if parent in shipped_recipes(other):
            raise InputError(
                f"recipe '{label}' extends '{parent}', which is a recipe for {command}, "
                f"not for {_COMMANDS[kind]}."
            )
    inside = Path(parent, RECIPE)
    is_folder = _is_file(path.parent / inside)
    guesses = [str(inside)] if is_folder else difflib.get_close_matches(parent, shipped, n=1)
    hint = f"did you mean '{guesses[0]}'?" if guesses else f"the shipped recipes are {', '.join(shipped)}."
    raise InputError(
        f"recipe '{label}' extends '{parent}', but there is no file '{relative}' and no shipped recipe of "
        f"that name; {hint}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A name that the file system does not allow.
        return False


def _settings_of_file(path: Path) -> dict[str, Any]:
    """The settings in one file, not yet checked."""
    try:
        text = path.read_text(encoding="utf-8")
        # Unlike yaml.safe_load, this loader reads 1e-3 as a number, but a mapping without any values as text.
        values = jsonargparse.get_loader("yaml")(text)
        if not isinstance(values, dict):
            values = yaml.safe_load(text)
        json.dumps(values, default=str)  # Rejects aliases that contain themselves.
    except OSError as error:
        raise InputError(f"the recipe '{path}' cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe '{path}' is not UTF-8; save it as UTF-8.") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"the recipe '{path}' is not valid YAML{_yaml_problem(error)}.") from error
    if not isinstance(values, dict):
        raise InputError(f"the recipe '{path}' contains no settings; write them as 'name: value'.")
    return _in_groups(values)


def _in_groups(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same settings, with dotted names (`data.context: 64`) moved into their groups."""
    grouped: dict[Any, Any] = {}
    for name, value in settings.items():
        value = _in_groups(value) if isinstance(value, Mapping) else value
        for part in reversed(name.split(".") if isinstance(name, str) else [name]):
            value = {part: value}
        _merge(grouped, value)
    return grouped


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f" (line {error.problem_mark.line + 1}: {error.problem})"
    return f" ({reason_of(error)})"


def _check(settings: dict[str, Any], label: str, kind: type, options: Options) -> None:
    """Check that the settings of one file exist and have the right types."""
    fields = {field.name for field in dataclasses.fields(kind)}
    names = settings.keys()
    for other, command in _COMMANDS.items():
        if names & _UNIQUE_SETTINGS[other] and not names & _UNIQUE_SETTINGS[kind]:
            raise InputError(f"'{label}' is a recipe for {command}, not for {_COMMANDS[kind]}.")
    if (mistake := mistake_in(settings, options)) is not None:
        raise InputError(f"recipe '{label}': {mistake}")
    try:
        _parse(kind, {name: value for name, value in settings.items() if name in fields})
    except jsonargparse.ArgumentError as error:
        raise InputError(f"recipe '{label}': {explain(str(error), options)}") from error
