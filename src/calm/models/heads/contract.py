"""The contract of a generative head: states of the backbone -> draws of the next chunk, and a training loss.

A head draws latents, which the autoencoder decodes (`LatentHead`), or tokens (`GenerativeHead` itself). It
has a likelihood if it fulfils `Likelihood` as well.

Shapes: B batch, C chunks, K tokens per chunk, P positions, D state size, Z latent size, N draws.
"""

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from calm.core.distillation import Teaching
from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness
from calm.errors import NotFiniteError
from calm.models.heads.fields import HeadConfig, refuse_old_names

MIN_TEMPERATURE = 0.01
"""The lowest temperature at which probabilities are asked for: scores are divided by it."""


class Target(NamedTuple):
    """What a loss compares with, at P positions.

    Args:
        posterior_PZ: Distribution of the next latent under the frozen autoencoder.
        tokens_PK: Tokens of the next chunk.
    """

    posterior_PZ: DiagonalGaussian
    tokens_PK: Tensor


class GenerativeHead(nn.Module, abc.ABC):
    """Turns states into draws of the next chunk, and knows its own training loss.

    Layers start as normal matrices with zero biases, norms as the identity; for a layer that starts with
    zero weights there is `calm.models.blocks.ZeroLinear`.

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone.
        latent_size: Dimensions of a latent Z.
    """

    config: HeadConfig

    def __init__(self, config: HeadConfig, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size, self.latent_size = hidden_size, latent_size

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        renamed = {
            "draw": "draw_latents, of a LatentHead",
            "draw_at": "the temperature of draw_chunks and draw_latents",
            "begin_with": "init_from_counts",
            "read_chunks": "embed_chunks",
            "loss": "_loss(states_PD, target, noise)",
        }
        if cls.__module__ != __name__:
            refuse_old_names(cls, renamed)

    @abc.abstractmethod
    def prepare(self, states_PD: Tensor) -> Tensor:
        """What all draws of a position share, computed once: any tensor with a first axis P."""

    @abc.abstractmethod
    def draw_chunks(
        self, prepared_P: Tensor, num_draws: int, randomness: Randomness = None, temperature: float = 1.0
    ) -> Tensor:
        """Independent draws of the next chunk, token ids (N, P, K).

        Args:
            prepared_P: Positions as `prepare` gives them, or some of them.
            num_draws: Number of draws N.
            randomness: Source of the noise: one generator, or one for each position.
            temperature: From the configuration's `lowest_temperature` to 1, at the cost of a draw at 1.

        Raises:
            ValueError: If the head does not take the temperature, or its weights are damaged.
        """

    @abc.abstractmethod
    def _loss(self, states_PD: Tensor, target: Target, noise: Any) -> Tensor:
        """Training loss of every position, (P,), with the noise of `draw_noise`."""

    def loss(
        self, states_PD: Tensor, target: Target, noise: Any = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Training loss of every position, (P,).

        Args:
            states_PD: States of the chunks before.
            target: What is predicted.
            noise: All randomness, as `draw_noise` gives it; fresh when None.
            generator: Source of fresh noise; the default generator when None.
        """
        if noise is None:
            noise = self.draw_noise(len(states_PD), generator, states_PD.device)
        return self._loss(states_PD, target, noise)

    def draw_noise(
        self, num_positions: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Any:
        """All randomness of one loss: a named tuple of tensors with the positions as second axis, or of None.

        Training draws it for each block by itself, so that it does not depend on the blocks beside it. None
        where the loss has no randomness.
        """
        return None

    def attach(self, autoencoder: nn.Module) -> None:
        """Get to know the frozen autoencoder of the model, once, before its weights are loaded."""
        return

    def attach_backbone(self, backbone: nn.Module) -> None:
        """Get to know the model's backbone, whose `embed_tokens` may be shared, as `attach` does."""
        return

    def init_from_counts(self, count_tokens: Callable[[], Tensor]) -> None:
        """Start from how often each token occurs in the training text; a new model's head is asked once.

        Args:
            count_tokens: Counts them, (V,); V may be less than the head's vocabulary, if that is another's.
        """
        return

    def init_from_neighbours(self, count_neighbours: Callable[[], Tensor]) -> None:
        """Start from what stands beside each token in the training text; asked before `init_from_counts`.

        Args:
            count_neighbours: Counts how often each token stood before and behind the most frequent ones,
                (V, N); V may be less than the head's vocabulary, if that is another's.
        """
        return

    def check_loaded(self) -> None:
        """Raise ValueError if what was loaded cannot be used; that all numbers are finite is known."""
        return

    def embed_chunks(self, chunks_BCK: Tensor) -> Tensor | None:
        """What the head reads of each chunk itself, (B, C, `extra_state_size`).

        It is appended to the backbone's states: the D of all methods is hidden size + `extra_state_size`.
        """
        return None

    def boundary_layers(self) -> list[nn.Module]:
        """Layers that meet noise, latents, token embeddings or the vocabulary; Muon leaves them to AdamW."""
        return []

    def check_temperature(self, temperature: float, is_asked: bool = False) -> None:
        """Raise ValueError unless a single draw can have the temperature.

        Args:
            temperature: The temperature.
            is_asked: Whether the head is asked for one by name, which it then must take even at 1.
        """
        lowest, name = self.config.lowest_temperature, self.config.head_type
        if lowest <= temperature <= 1 and not (is_asked and lowest == 1):
            return
        if lowest == 1:
            raise ValueError(f"a {name} head does not take a temperature; use the sampler 'exact' or 'pool'.")
        at_zero = "; sampler='pool' gives the most frequent chunk at 0" if lowest > 0 else ""
        raise ValueError(
            f"a {name} head takes temperatures from {lowest:g} to 1, got {temperature:g}{at_zero}."
        )


class LatentHead(GenerativeHead):
    """A head whose draws are latents."""

    _autoencoder: tuple[nn.Module, ...] = ()

    @abc.abstractmethod
    def draw_latents(
        self,
        prepared_P: Tensor,
        num_draws: int,
        randomness: Randomness = None,
        noise: Any = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Independent draws of the next latent, (N, P, Z), of any float type.

        Args:
            prepared_P: Positions as `prepare` gives them, or some of them.
            num_draws: Number of draws N.
            randomness: Source of the noise: one generator, or one for each position.
            noise: Recorded noise to use instead, in the form that the head documents.
            temperature: Always 1 unless the configuration's `lowest_temperature` is less.
        """

    def attach(self, autoencoder: nn.Module) -> None:
        """See `GenerativeHead`."""
        self._autoencoder = (autoencoder,)  # In a tuple, so that it is not taken for a part of the head.

    def draw_chunks(
        self, prepared_P: Tensor, num_draws: int, randomness: Randomness = None, temperature: float = 1.0
    ) -> Tensor:
        """See `GenerativeHead`: latents, decoded by the autoencoder."""
        self.check_temperature(temperature)
        latents_NPZ = self.draw_latents(prepared_P, num_draws, randomness, temperature=temperature)
        require_finite(latents_NPZ)
        (autoencoder,) = self._autoencoder
        return autoencoder.decode_tokens(latents_NPZ)  # type: ignore[operator]

    def sample_latents(
        self, states_PD: Tensor, num_draws: int, randomness: Randomness = None, noise: Any = None
    ) -> Tensor:
        """`prepare` and `draw_latents` at temperature 1, (N, P, Z)."""
        return self.draw_latents(self.prepare(states_PD), num_draws, randomness, noise)


class TokenProbabilities(NamedTuple):
    """What the distribution of each token of some chunks, given all tokens before it, says.

    Args:
        of_token_PK: Probability of the token.
        of_pair_PK: Probability that two draws of the token agree: the sum of the distribution's squares.
        highest_PK: Probability of the likeliest token.
    """

    of_token_PK: Tensor
    of_pair_PK: Tensor
    highest_PK: Tensor


@runtime_checkable
class Likelihood(Protocol):
    """A head that knows the probability of every chunk."""

    def token_losses(self, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """Cross-entropy of each token of the chunks given all before it, in nats, (P, K)."""

    def token_probabilities(
        self, states_PD: Tensor, tokens_PK: Tensor, temperature: float = 1.0
    ) -> TokenProbabilities:
        """What the distribution of each token given all before it says, (P, K) each.

        Args:
            states_PD: States of the chunks before.
            tokens_PK: The chunks.
            temperature: Of the draws, from `MIN_TEMPERATURE` to 1, for heads that take one.
        """


@runtime_checkable
class TokenDistributions(Protocol):
    """A head that can tell the whole distribution of a token, as drafts need it."""

    def token_distribution(
        self, states_PD: Tensor, tokens_PK: Tensor, place: int, temperature: float = 1.0
    ) -> Tensor:
        """The distribution of the token at a place of each chunk, given those before it, (P, V).

        Args:
            states_PD: States of the chunks before.
            tokens_PK: The chunks; those from the place on do not matter.
            place: Which token, from 0 on.
            temperature: As in `Likelihood.token_probabilities`.
        """


@runtime_checkable
class Teachable(Protocol):
    """A head that can learn the distribution of each token from a teacher (docs/uptraining.md)."""

    def taught_losses(self, states_PD: Tensor, tokens_PK: Tensor, teaching: Teaching) -> Tensor:
        """Loss of each token of the chunks, (P, K); see `calm.core.distillation`.

        Args:
            states_PD: States of the chunks before.
            tokens_PK: The chunks.
            teaching: What the teacher says of their P·K tokens, each given all before it.
        """


_traced: ContextVar[list[Tensor] | None] = ContextVar("traced", default=None)


@contextmanager
def traced_checks() -> Iterator[list[Tensor]]:
    """Gather the answers to `require_finite`, a tensor each, of a draw that is traced."""
    checks: list[Tensor] = []
    token = _traced.set(checks)
    try:
        yield checks
    finally:
        _traced.reset(token)


def require_finite(drawn: Tensor) -> None:
    """Raise NotFiniteError if latents or scores of a draw are not finite (see `traced_checks`)."""
    is_finite = drawn.isfinite().all()
    if (checks := _traced.get()) is not None:
        checks.append(is_finite)
    elif not bool(is_finite):
        refuse_damaged(drawn.dtype)


def refuse_damaged(dtype: torch.dtype) -> NoReturn:
    """Raise the error of a draw that is not finite."""
    raise NotFiniteError(
        f"the head drew a latent or score that is not finite (in {dtype}); "
        "the weights may be damaged, or the dtype too narrow for them."
    )
