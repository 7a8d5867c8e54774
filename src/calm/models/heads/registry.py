"""Registry of heads by name: the `head_type` of a checkpoint or recipe."""

import dataclasses
import difflib
from importlib.metadata import entry_points
from typing import Any

from calm.models.heads.contract import GenerativeHead
from calm.models.heads.fields import HeadConfig

_REGISTRY: dict[str, tuple[type[HeadConfig], type[GenerativeHead]]] = {}
_ENTRY_POINTS = "calm.heads"
_MOVED_OUT = {"mean_flow": "examples/a_head_of_your_own.py"}


def register_head(head_type: str, config: type[HeadConfig], head: type[GenerativeHead]) -> None:
    """Register a head under a name.

    An installed package can instead declare a module that calls this as an entry point in the group
    "calm.heads"; it is imported when a model or recipe asks for a head with the entry point's name.

    Args:
        head_type: The name, saved in checkpoints.
        config: Dataclass of the head's fields.
        head: Module built as `head(config, hidden_size, latent_size)`.

    Raises:
        TypeError: If the configuration is not a dataclass.
    """
    if "__dataclass_fields__" not in vars(config):
        raise TypeError(f"{config.__name__} must be a dataclass: decorate it with @dataclass(kw_only=True).")
    _REGISTRY[head_type] = (config, head)


def parse_head_config(values: dict[str, Any]) -> HeadConfig:
    """Build the typed configuration from a checkpoint's dict.

    Raises:
        ValueError: If the head or one of its fields is unknown, or a value is out of range.
    """
    head_type = values.get("head_type", "energy")
    if not isinstance(head_type, str):
        raise ValueError(f"head_type must be the name of a head, got {head_type!r}.")
    config_class, _ = _find_head(head_type)
    _check_names(values, config_class, head_type)
    return config_class(**{**values, "head_type": head_type})


def with_sampling(config: HeadConfig, changes: dict[str, Any]) -> HeadConfig:
    """The configuration with other sampling fields.

    Raises:
        ValueError: If a field is not one of `sampling_fields`, or a value is out of range.
    """
    return _changed(config, changes, config.sampling_fields)


def with_training(config: HeadConfig, changes: dict[str, Any]) -> HeadConfig:
    """The configuration with other training fields.

    Raises:
        ValueError: If a field is not one of `training_fields`, or a value is out of range.
    """
    return _changed(config, changes, config.training_fields)


def _changed(config: HeadConfig, changes: dict[str, Any], changeable: tuple[str, ...]) -> HeadConfig:
    _check_names(changes, type(config), config.head_type)
    for name in changes:
        if name not in changeable:
            known = ", ".join(changeable) or "none"
            raise ValueError(
                f"'{name}' of a trained {config.head_type} head cannot be changed; these can: {known}."
            )
    return dataclasses.replace(config, **changes)


def build_head(config: HeadConfig, hidden_size: int, latent_size: int) -> GenerativeHead:
    """Build the module for a configuration."""
    _, head_class = _find_head(config.head_type)
    return head_class(config, hidden_size, latent_size)


def _find_head(head_type: str) -> tuple[type[HeadConfig], type[GenerativeHead]]:
    if head_type not in _REGISTRY:
        for entry_point in entry_points(group=_ENTRY_POINTS, name=head_type):
            entry_point.load()
    if head_type not in _REGISTRY:
        if head_type in _MOVED_OUT:
            raise ValueError(
                f"the {head_type} head has moved out of the package, to {_MOVED_OUT[head_type]}: "
                "import that file first."
            )
        raise ValueError(
            f"unknown head_type '{head_type}'; known heads: {', '.join(_REGISTRY)}. Import the file that "
            "defines it first, or install it as a package with an entry point of the group calm.heads."
        )
    return _REGISTRY[head_type]


def _check_names(values: dict[str, Any], config_class: type[HeadConfig], head_type: str) -> None:
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known fields: {', '.join(known)}."
            raise ValueError(f"the {head_type} head has no field '{name}'{hint}")
