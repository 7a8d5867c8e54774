"""What the configuration of every head has: its fields, the checks of their values, what it costs."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from calm.errors import shown

_LARGEST, _MOST_BLOCKS = 10**7, 10_000  # Files of configurations are not trusted.


class HeadFlops(NamedTuple):
    """FLOPs of a head at one position, two for each multiply-add.

    Args:
        shared: Of sampling, whatever the number of draws.
        per_draw: Of sampling, for each draw; all steps of a solver.
        training_shared: Of training, forward and backward, whatever the number of draws.
        training_per_draw: Of training, for each draw.
        training_draws: Draws, or targets, of a position in training.
    """

    shared: int
    per_draw: int
    training_shared: int
    training_per_draw: int
    training_draws: int

    @classmethod
    def of_forward_pass(cls, shared: int, per_draw: int, training_draws: int) -> "HeadFlops":
        """Those of a head that trains on what it samples with; a backward pass costs two forward passes.

        Args:
            shared: Multiply-adds of a position, whatever the number of draws.
            per_draw: Multiply-adds of each draw.
            training_draws: Draws of a position in training.
        """
        return cls(2 * shared, 2 * per_draw, 6 * shared, 6 * per_draw, training_draws)


@dataclass(kw_only=True)
class HeadConfig:
    """Fields that every head has.

    Args:
        head_type: Name of the head in the registry.
    """

    head_type: str

    sampling_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that only affect how a trained head is drawn from. They may change after training, by
    replacing the head's `config`: read them at every draw."""

    training_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that only affect how the head is trained. A run that begins with a model takes them from its
    recipe: read them at every loss."""

    lowest_temperature: ClassVar[float] = 1.0
    """The lowest temperature of a single draw; below 1, the sampler "head" can use it."""

    needs_codes: ClassVar[bool] = False
    """Whether the head learns tokens, so that no autoencoder is to be trained: the model's is then of kind
    "codes", where the latent of a chunk is made of fixed codes of its tokens."""

    decodes_latents: ClassVar[bool] = True
    """Whether the autoencoder decodes each draw; not where the head draws tokens itself."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_old_names(cls, {"work": "flops", "own_size": "extra_state_size"})

    def __post_init__(self) -> None:
        """Refuse values of other types than the fields have; heads add their ranges.

        Raises:
            ValueError: If a value does not fit.
        """
        kinds = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), kinds[field.name])

    @property
    def extra_state_size(self) -> int:
        """Numbers that the head appends to the state of every chunk; see `GenerativeHead.embed_chunks`."""
        return 0

    @property
    def learns_cross_entropy(self) -> bool:
        """Whether a head that has a likelihood is trained by it: its loss is in nats a token then, and it can
        have a teacher."""
        return True

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """What the head costs, for `calm flops` and equal budgets.

        Args:
            hidden_size: Width of the backbone D.
            latent_size: Dimensions of a latent Z.

        Raises:
            NotImplementedError: If the head does not say.
        """
        raise NotImplementedError(f"the FLOPs of a '{self.head_type}' head are not known.")


def check_counts(config: HeadConfig, *names: str) -> None:
    """Raise ValueError unless the named fields are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")


def refuse_old_names(cls: type, renamed: dict[str, str]) -> None:
    """Raise TypeError if a head written for version 0.1 defines a member that has another name now."""
    for old, new in renamed.items():
        if old in vars(cls):
            raise TypeError(f"{cls.__name__}.{old} is now {new}; see docs/heads.md.")


def _check_type(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        fits, expected = value in get_args(kind), f"one of {', '.join(map(str, get_args(kind)))}"
    elif kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits, expected = is_number and math.isfinite(value), "a finite number"
    elif kind is int:
        most = _MOST_BLOCKS if name == "num_blocks" else _LARGEST
        fits = isinstance(value, int) and not isinstance(value, bool) and value <= most
        expected = f"a whole number of at most {most:,}"
    elif kind in (bool, str):
        fits, expected = isinstance(value, kind), {bool: "true or false", str: "a text"}[kind]
    else:  # Only the head itself knows.
        return
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {shown(value)}.")
