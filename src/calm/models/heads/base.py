"""The contract that a generative head fulfils, and the registry of heads.

Shapes: P positions, D hidden size, Z latent size, N draws.
"""

import abc
import difflib
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness


@dataclass(kw_only=True)
class HeadConfig:
    """Fields that every head has.

    Args:
        head_type: Name of the head in the registry.
    """

    head_type: str


class GenerativeHead(nn.Module, abc.ABC):
    """Turns hidden states into draws of the next latent, and knows its own training loss.

    Layers start as normal matrices with zero biases, norms as the identity; for a layer that starts
    with zero weights there is `calm.models.blocks.ZeroLinear`.
    """

    @abc.abstractmethod
    def loss(
        self,
        hidden_PD: Tensor,
        posterior_PZ: DiagonalGaussian,
        generator: torch.Generator | None = None,
        noise: Any = None,
    ) -> Tensor:
        """Training loss of every position, shape (P,).

        Args:
            hidden_PD: Backbone states.
            posterior_PZ: Law of the next latent under the frozen autoencoder.
            generator: Source of randomness; the default generator when None.
            noise: Recorded randomness to use instead, in the form that the head documents.
        """

    @abc.abstractmethod
    def prepare(self, hidden_PD: Tensor) -> Tensor:
        """What all draws of a position share, computed once: any tensor with a first axis P."""

    @abc.abstractmethod
    def draw(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Independent draws of the next latent for prepared positions, shape (N, P, Z).

        Args:
            prepared_P: Positions as `prepare` gives them, or some of them.
            num_draws: Number of draws N.
            randomness: Source of the noise: one generator, or one for each position.
            noise: Recorded noise to use instead, in the form that the head documents.
        """

    def sample(
        self,
        hidden_PD: Tensor,
        num_draws: int,
        generator: Randomness = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Independent draws of the next latent, shape (N, P, Z)."""
        return self.draw(self.prepare(hidden_PD), num_draws, generator, noise)

    def boundary_layers(self) -> list[nn.Module]:
        """Layers whose inputs or outputs are noise or latents; Muon leaves them to AdamW."""
        return []


_REGISTRY: dict[str, tuple[type[HeadConfig], type[GenerativeHead]]] = {}


def register_head(head_type: str, config: type[HeadConfig], head: type[GenerativeHead]) -> None:
    """Make a head known under a name.

    Args:
        head_type: The name, saved in checkpoints.
        config: Dataclass of the head's fields.
        head: Module built as `head(config, hidden_size, latent_size)`.
    """
    _REGISTRY[head_type] = (config, head)


def parse_head_config(values: dict[str, Any]) -> HeadConfig:
    """Typed configuration from the dict of a checkpoint.

    Raises:
        ValueError: If the head or one of its fields is unknown, or a value is out of range.
    """
    head_type = values.get("head_type", "energy")
    if head_type not in _REGISTRY:
        raise ValueError(f"unknown head_type '{head_type}'; known heads: {', '.join(_REGISTRY)}.")
    config_class, _ = _REGISTRY[head_type]
    known = [field.name for field in fields(config_class)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known fields: {', '.join(known)}."
            raise ValueError(f"the {head_type} head has no field '{name}'{hint}")
    return config_class(**{**values, "head_type": head_type})


def build_head(config: HeadConfig, hidden_size: int, latent_size: int) -> GenerativeHead:
    """The module that belongs to a configuration."""
    _, head_class = _REGISTRY[config.head_type]
    return head_class(config, hidden_size, latent_size)
