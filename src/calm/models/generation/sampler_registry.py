"""Samplers by name, resolved at the edges: the command line, the server, arguments of `generate`."""

import dataclasses
from importlib.metadata import entry_points
from typing import Any

from calm.core.samplers import ExactSampler, HeadSampler, PoolSampler, Sampler, check_counts
from calm.core.temperature import check_cuts
from calm.errors import InputError, shown
from calm.models.heads import HeadConfig

_ENTRY_POINTS = "calm.samplers"
_SAMPLERS: dict[str, type] = {"exact": ExactSampler, "pool": PoolSampler, "head": HeadSampler}


def register_sampler(name: str, sampler: type) -> None:
    """Register a sampler under a name, for the command line, the server and `generate`.

    An installed package can instead declare a module that calls this as an entry point in the group
    "calm.samplers". Without a name, a sampler can be passed to `generate` as an object.

    Args:
        name: The name.
        sampler: A frozen dataclass with the members of `Sampler` and `temperature` among its fields. Built by
            name, it gets the fields that are arguments of `sampler_from`; the others keep their defaults.
    """
    _SAMPLERS[name] = sampler


def sampler_from(
    *,
    sampler: str | Sampler = "exact",
    temperature: float = 1.0,
    num_draws: int | None = None,
    max_draws: int | None = None,
    first_block: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Sampler:
    """The sampler for a command line, a request or the arguments of `generate`.

    A setting that the sampler does not have is ignored, except `top_p` and `min_p`, which would change the
    text. At temperature 0, "exact" means the limit of the pool rule.

    Args:
        sampler: "exact", "pool", "head" or another registered name. A sampler object is returned as it is,
            and must come without other settings.
        temperature: T in [0, 1]; ignored for a sampler object, which has its own.
        num_draws: See `PoolSampler`.
        max_draws: See `ExactSampler`.
        first_block: See `ExactSampler`.
        top_p: See `PoolSampler`.
        min_p: See `PoolSampler`.

    Raises:
        ValueError: If the name is unknown, a value is out of range, or a sampler object comes with settings.
    """
    if not isinstance(sampler, str):
        counts = {"num_draws": num_draws, "max_draws": max_draws, "first_block": first_block}
        given = [name for name, value in counts.items() if value is not None]
        if _truncates(top_p, min_p):
            given.append("top_p and min_p")
        if given:
            raise ValueError(f"a sampler object brings its own settings: set {given[0]} on the object.")
        return sampler
    check_cuts(1.0 if top_p is None else top_p, min_p or 0.0)
    check_counts(num_draws=num_draws, max_draws=max_draws, first_block=first_block)
    kind = _find(sampler)
    if kind is ExactSampler and temperature == 0:
        kind = PoolSampler
    settings: dict[str, Any] = {"temperature": temperature, "num_draws": num_draws, "max_draws": max_draws}
    settings |= {"first_block": first_block, "top_p": top_p, "min_p": min_p}
    accepted = {field.name for field in dataclasses.fields(kind)}
    if _truncates(top_p, min_p) and (sampler == "exact" or not {"top_p", "min_p"} <= accepted):
        raise ValueError("top_p and min_p truncate a pool of draws: use them with sampler='pool'.")
    return kind(**{name: value for name, value in settings.items() if value is not None and name in accepted})


def check_name(name: str) -> None:
    """Raise InputError unless a sampler of that name exists."""
    try:
        _find(name)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def default_sampler(
    head: HeadConfig, temperature: float, top_p: float | None = None, min_p: float | None = None
) -> str:
    """The sampler if none is named.

    The pool sampler with truncation, else the head's own if it takes the temperature, else the exact one.
    """
    if _truncates(top_p, min_p):
        return "pool"
    return "head" if head.lowest_temperature < 1 and temperature >= head.lowest_temperature else "exact"


def _truncates(top_p: float | None, min_p: float | None) -> bool:
    """Whether `top_p` or `min_p` can drop a chunk."""
    return (top_p is not None and top_p < 1) or (min_p is not None and min_p > 0)


def _find(name: str) -> type:
    if name not in _SAMPLERS:
        for entry_point in entry_points(group=_ENTRY_POINTS, name=name):
            entry_point.load()
    if name not in _SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(_SAMPLERS)}; got {shown(name)}.")
    return _SAMPLERS[name]
