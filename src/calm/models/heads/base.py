"""The contract that a generative head fulfils, and the registry of heads.

Shapes: P positions, D hidden size, Z latent size, N draws.
"""

import abc
import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness
from calm.errors import shown
from calm.models.blocks import PartedLinear


class HeadWork(NamedTuple):
    """Multiply-adds of a head for one position; a backward pass counts twice its forward pass.

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


class TokenChances(NamedTuple):
    """What the law of each token of some chunks, given all tokens before it, says.

    Args:
        of_token_PK: Probability of the token.
        of_pair_PK: Chance that two draws of the token agree: the sum of the squares of the law.
        highest_PK: Probability of the likeliest token.
    """

    of_token_PK: Tensor
    of_pair_PK: Tensor
    highest_PK: Tensor


@dataclass(kw_only=True)
class HeadConfig:
    """Fields that every head has.

    Args:
        head_type: Name of the head in the registry.
    """

    head_type: str

    sampling_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that only say how a trained head is drawn from, so that they may change afterwards: then
    the head's `config` is replaced, so it reads them anew for every draw."""

    needs_codes: ClassVar[bool] = False
    """Whether the head only draws codes of tokens: then the autoencoder must be of kind "codes"."""

    def __post_init__(self) -> None:
        """Refuse values of other types than the fields have; heads add their ranges.

        Raises:
            ValueError: If a value does not fit.
        """
        kinds = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), kinds[field.name])

    @property
    def own_size(self) -> int:
        """Numbers that the head itself reads of every chunk; see `GenerativeHead.read_chunks`."""
        return 0

    def work(self, hidden_size: int, latent_size: int) -> HeadWork:
        """What the head costs, for `calm flops` and equal budgets.

        Args:
            hidden_size: Width of the backbone D.
            latent_size: Dimensions of a latent Z.

        Raises:
            NotImplementedError: If the head does not say.
        """
        raise NotImplementedError(f"the operations of a '{self.head_type}' head are not known.")


_MOST, _MOST_BLOCKS = 10**7, 10_000  # Files of configurations are not trusted.


def _check_type(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        fits, expected = value in get_args(kind), f"one of {', '.join(map(str, get_args(kind)))}"
    elif kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits, expected = is_number and math.isfinite(value), "a finite number"
    elif kind is int:
        most = _MOST_BLOCKS if name == "num_blocks" else _MOST
        fits = isinstance(value, int) and not isinstance(value, bool) and value <= most
        expected = f"a whole number of at most {most:,}"
    elif kind in (bool, str):
        fits, expected = isinstance(value, kind), {bool: "true or false", str: "a text"}[kind]
    else:  # Only the head itself knows.
        return
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {shown(value)}.")


def check_counts(config: HeadConfig, *names: str) -> None:
    """Raise ValueError unless the named fields are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")


class GenerativeHead(nn.Module, abc.ABC):
    """Turns hidden states into draws of the next latent, and knows its own training loss.

    A head is built as `head(config, hidden_size, latent_size)` and keeps the configuration as `config`.
    Layers start as normal matrices with zero biases, norms as the identity; for a layer that starts
    with zero weights there is `calm.models.blocks.ZeroLinear`.
    """

    config: HeadConfig

    needs_tokens: ClassVar[bool] = False
    """Whether `loss` also takes `tokens_PK`, the tokens of the target chunks."""
    has_likelihood: ClassVar[bool] = False
    """Whether chunks have a known probability: then there are `token_losses` and `token_probabilities`."""
    lowest_temperature: ClassVar[float] = 1.0
    """The lowest temperature that one draw can have; where it lies below 1 there is `draw_at`."""

    def attach(self, autoencoder: nn.Module) -> None:
        """Get to know the frozen autoencoder of the model, once, before its weights are loaded."""
        return

    def begin_with(self, count_tokens: Callable[[], Tensor]) -> None:
        """Start from how often each token occurs in the training text; a new model's head is asked once.

        Args:
            count_tokens: Counts them, (V,); V may be less than the head's vocabulary, if that is another's.
        """
        return

    def read_chunks(self, chunks_BCK: Tensor) -> Tensor | None:
        """What the head itself wants to know of the chunk that a state stands for, (B, C, `own_size`).

        It is put behind the backbone's state, so that all methods get states of D + `own_size` numbers.
        """
        return None

    def token_losses(self, hidden_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """Cross-entropy of each token of the chunks given all before it, in nats, (P, K).

        Raises:
            NotImplementedError: If the head `has_likelihood` not.
        """
        raise NotImplementedError(f"a '{self.config.head_type}' head has no likelihood.")

    def token_probabilities(
        self, hidden_PD: Tensor, tokens_PK: Tensor, temperature: float = 1.0
    ) -> TokenChances:
        """What the law of each token given all before it says, (P, K) each.

        Args:
            hidden_PD: Backbone states.
            tokens_PK: The chunks.
            temperature: Of the draws, as `draw_at` takes it.

        Raises:
            NotImplementedError: If the head `has_likelihood` not.
        """
        raise NotImplementedError(f"a '{self.config.head_type}' head has no likelihood.")

    def draw_at(
        self, temperature: float, prepared_P: Tensor, num_draws: int, randomness: Randomness = None
    ) -> Tensor:
        """Independent draws at a temperature below 1, (N, P, Z), for the price of as many at T = 1.

        Raises:
            NotImplementedError: If the head takes no temperature.
        """
        raise NotImplementedError(f"a '{self.config.head_type}' head does not take a temperature.")

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

    def draw_noise(
        self,
        num_positions: int,
        latent_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Any:
        """All randomness of one loss, in the form that `loss` takes as `noise`; None if there is none.

        A named tuple of tensors whose second axis is that of the positions, or of None. Training draws it for
        each block by itself, so that it does not depend on the blocks beside it.
        """
        return None

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
        """Independent draws of the next latent for prepared positions, shape (N, P, Z), of any float type.

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


@dataclass(kw_only=True)
class CodeHeadConfig(HeadConfig):
    """Fields of heads that draw codes of tokens.

    Args:
        rank: Size of a token's vector before the scores of the vocabulary.
        bias_from_text: Whether a new model's scores start from how often each token occurs in its text.
        vocab_size: Tokens; the model fills it in.
        chunk_size: Tokens per chunk; the model fills it in.
    """

    rank: int = 64
    bias_from_text: bool = True
    vocab_size: int = 1
    chunk_size: int = 1

    needs_codes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "rank", "vocab_size", "chunk_size")


LOWEST_OF_LAWS = 0.01
"""The lowest temperature of a law that is the softmax of scores: they are divided by it."""


class CodeHead(GenerativeHead):
    """What heads that draw codes of tokens share: they know the codes, and take a temperature."""

    config: CodeHeadConfig

    needs_tokens: ClassVar[bool] = True
    lowest_temperature: ClassVar[float] = LOWEST_OF_LAWS
    _codes: tuple[nn.Embedding, ...] = ()
    scores: PartedLinear
    """The last layer: vectors of tokens -> scores of the vocabulary."""

    def attach(self, autoencoder: nn.Module) -> None:
        """See `GenerativeHead`: of the autoencoder, which is one of codes, it needs these."""
        # In a tuple, so that they are not taken for a part of the head.
        self._codes = (autoencoder.get_input_embeddings(),)  # type: ignore[operator]

    @torch.no_grad()
    def begin_with(self, count_tokens: Callable[[], Tensor]) -> None:
        """See `GenerativeHead`: the first law of every token is that of single tokens."""
        if self.config.bias_from_text:
            counts_V = count_tokens().double()
            seen_V = F.pad(counts_V, (0, self.config.vocab_size - len(counts_V))) + 0.5  # No logarithm of 0.
            self.scores.bias.copy_((seen_V / seen_V.sum()).log())

    @classmethod
    def check_temperature(cls, temperature: float, lowest: float | None = None) -> None:
        """Raise ValueError unless a draw can have the temperature: `lowest` (default: the head's) to 1."""
        least = cls.lowest_temperature if lowest is None else lowest
        if not least <= temperature <= 1:
            raise ValueError(f"the temperature of a draw must lie in [{least:g}, 1], got {temperature:g}.")


_REGISTRY: dict[str, tuple[type[HeadConfig], type[GenerativeHead]]] = {}
_ENTRY_POINTS = "calm.heads"


def register_head(head_type: str, config: type[HeadConfig], head: type[GenerativeHead]) -> None:
    """Make a head known under a name.

    An installed package can instead name, as an entry point of the group "calm.heads", a module that calls
    this; it is imported when a model or recipe asks for a head of the entry point's name.

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
    if not isinstance(head_type, str):
        raise ValueError(f"head_type must be the name of a head, got {head_type!r}.")
    config_class, _ = _find_head(head_type)
    _check_names(values, config_class, head_type)
    return config_class(**{**values, "head_type": head_type})


def with_sampling(config: HeadConfig, changes: dict[str, Any]) -> HeadConfig:
    """The same head, drawn from in another way.

    Raises:
        ValueError: If a field is not one of `sampling_fields`, or a value is out of range.
    """
    _check_names(changes, type(config), config.head_type)
    for name in changes:
        if name not in config.sampling_fields:
            known = ", ".join(config.sampling_fields) or "none"
            raise ValueError(
                f"'{name}' of a trained {config.head_type} head cannot be changed; what can: {known}."
            )
    return dataclasses.replace(config, **changes)


def build_head(config: HeadConfig, hidden_size: int, latent_size: int) -> GenerativeHead:
    """The module that belongs to a configuration."""
    _, head_class = _find_head(config.head_type)
    return head_class(config, hidden_size, latent_size)


def takes_temperature(config: HeadConfig) -> bool:
    """Whether a head of this configuration draws at a temperature for the price of a draw."""
    return _find_head(config.head_type)[1].lowest_temperature < 1


def _find_head(head_type: str) -> tuple[type[HeadConfig], type[GenerativeHead]]:
    if head_type not in _REGISTRY:
        for entry_point in entry_points(group=_ENTRY_POINTS, name=head_type):
            entry_point.load()
    if head_type not in _REGISTRY:
        raise ValueError(f"unknown head_type '{head_type}'; known heads: {', '.join(_REGISTRY)}.")
    return _REGISTRY[head_type]


def _check_names(values: dict[str, Any], config_class: type[HeadConfig], head_type: str) -> None:
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known fields: {', '.join(known)}."
            raise ValueError(f"the {head_type} head has no field '{name}'{hint}")
