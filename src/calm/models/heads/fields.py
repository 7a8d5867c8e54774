"""What every head's configuration has: fields, checks of their values, FLOPs."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from calm.errors import shown

_MAX_INT, _MAX_BLOCKS = 10**7, 10_000  # Configuration files are untrusted.


class HeadFlops(NamedTuple):
    """FLOPs of a head at one position, two per multiply-add.

    Args:
        shared: To sample, once for all draws.
        per_draw: To sample, per draw, over all steps of a solver.
        training_shared: To train, forward and backward, once for all draws.
        training_per_draw: To train, forward and backward, per draw.
        training_draws: Draws, or targets, per position in training.
    """

    shared: int
    per_draw: int
    training_shared: int
    training_per_draw: int
    training_draws: int

    @classmethod
    def of_forward_pass(cls, shared: int, per_draw: int, training_draws: int) -> "HeadFlops":
        """FLOPs of a head with the same forward pass for loss and draws; a backward pass costs two of them.

        Args:
            shared: Multiply-adds per position, once for all draws.
            per_draw: Multiply-adds per draw.
            training_draws: Draws per position in training.
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
    """Fields that only affect sampling from a trained head. They may change after training, by replacing
    the head's `config`: read them at every draw."""

    training_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that only affect training. A run that starts from an existing model takes them from its
    recipe: read them whenever the loss is computed."""

    lowest_temperature: ClassVar[float] = 1.0
    """The lowest temperature of a single draw; if below 1, the sampler "head" can use this head."""

    needs_codes: ClassVar[bool] = False
    """Whether the head learns tokens, so that no autoencoder is trained: the model's is then of kind "codes",
    where a chunk's latent consists of fixed codes of its tokens."""

    decodes_latents: ClassVar[bool] = True
    """Whether the autoencoder decodes each draw; False if the head draws tokens itself."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_old_names(cls, {"work": "flops", "own_size": "extra_state_size"})

    def __post_init__(self) -> None:
        """Check the types of the values; heads add range checks.

        Raises:
            ValueError: If a value is invalid.
        """
        types = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), types[field.name])

    @property
    def extra_state_size(self) -> int:
        """How many numbers the head appends to each chunk's state; see `GenerativeHead.embed_chunks`."""
        return 0

    @property
    def learns_cross_entropy(self) -> bool:
        """Whether a head with a likelihood is trained by cross-entropy. Its loss is then in nats per token,
        and it can be distilled from a teacher."""
        return True

    def flops(self, hidden_size: int, latent_size: int) -> HeadFlops:
        """FLOPs of the head, for `calm flops` and equal budgets.

        Args:
            hidden_size: Width of the backbone D.
            latent_size: Dimensions of a latent Z.

        Raises:
            NotImplementedError: If the head does not define it.
        """
        raise NotImplementedError(f"the FLOPs of a '{self.head_type}' head are not known.")


def check_counts(config: HeadConfig, *names: str) -> None:
    """Raise ValueError unless the named fields are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")


def refuse_old_names(cls: type, renamed: dict[str, str]) -> None:
    """Raise TypeError if a head written for version 0.1 defines a member that has since been renamed."""
    for old, new in renamed.items():
        if old in vars(cls):
            raise TypeError(f"{cls.__name__}.{old} is now {new}; see docs/heads.md.")


def _check_type(name: str, value: Any, annotation: Any) -> None:
    if get_origin(annotation) is Literal:
        fits, expected = value in get_args(annotation), f"one of {', '.join(map(str, get_args(annotation)))}"
    elif annotation is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits, expected = is_number and math.isfinite(value), "a finite number"
    elif annotation is int:
        limit = _MAX_BLOCKS if name == "num_blocks" else _MAX_INT
        fits = isinstance(value, int) and not isinstance(value, bool) and value <= limit
        expected = f"a whole number of at most {limit:,}"
    elif annotation in (bool, str):
        fits, expected = isinstance(value, annotation), {bool: "true or false", str: "a string"}[annotation]
    else:  # Only the head itself can check other types.
        return
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {shown(value)}.")
