"""The contract of a generative head: backbone states -> draws of the next chunk, and a training loss.

A head draws latents, which the autoencoder decodes (`LatentHead`), or tokens (`GenerativeHead` itself). A
head with a likelihood also implements `Likelihood`.

Shapes: B batch, C chunks, K tokens per chunk, P positions, D state size, Z latent size, N draws.
"""

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from calm.core.distillation import SoftTargets
from calm.core.gaussian import DiagonalGaussian
from calm.core.random import Randomness
from calm.errors import NotFiniteError
from calm.models.heads.fields import HeadConfig, refuse_old_names

MIN_TEMPERATURE = 0.01
"""The lowest temperature at which probabilities are computed: logits are divided by it."""


class Target(NamedTuple):
    """Training targets at P positions.

    Args:
        posterior_PZ: The frozen autoencoder's posterior of the next latent.
        tokens_PK: Tokens of the next chunk.
    """

    posterior_PZ: DiagonalGaussian
    tokens_PK: Tensor


class GenerativeHead(nn.Module, abc.ABC):
    """Turns states into draws of the next chunk, and computes its own training loss.

    Layers are initialized with normally distributed weights and zero biases, norms to the identity; for a
    layer that starts at zero, use `calm.models.blocks.ZeroLinear`.

    Args:
        config: Fields of the head.
        hidden_size: Width of the backbone.
        latent_size: Dimensions of a latent Z.
    """

    config: HeadConfig
    shares_embeddings: ClassVar[bool] = False
    """Whether the head uses the backbone's token embeddings, which are then trained in any case."""

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
            "taught_losses": "distillation_losses",
            "loss": "_loss(states_PD, target, noise)",
        }
        if cls.__module__ != __name__:
            refuse_old_names(cls, renamed)

    @abc.abstractmethod
    def prepare(self, states_PD: Tensor) -> Tensor:
        """Compute what all draws of a position share, once: any tensor with a first axis P."""

    @abc.abstractmethod
    def draw_chunks(
        self, prepared_P: Tensor, num_draws: int, randomness: Randomness = None, temperature: float = 1.0
    ) -> Tensor:
        """Independent draws of the next chunk, token ids (N, P, K).

        Args:
            prepared_P: Output of `prepare`, or some of its rows.
            num_draws: Number of draws N.
            randomness: Source of the noise: one generator, or one per position.
            temperature: From the configuration's `lowest_temperature` to 1.

        Raises:
            ValueError: If the head does not support the temperature, or its weights are damaged.
        """

    @abc.abstractmethod
    def _loss(self, states_PD: Tensor, target: Target, noise: Any) -> Tensor:
        """Training loss of each position, (P,), given noise from `draw_noise`."""

    def loss(
        self, states_PD: Tensor, target: Target, noise: Any = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Training loss of each position, (P,).

        Args:
            states_PD: States of the preceding chunks.
            target: What to predict.
            noise: All the randomness, from `draw_noise`; sampled here if None.
            generator: Source of noise sampled here; the default generator if None.
        """
        if noise is None:
            noise = self.draw_noise(len(states_PD), generator, states_PD.device)
        return self._loss(states_PD, target, noise)

    def draw_noise(
        self, num_positions: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Any:
        """Sample all the randomness of one loss; None if the loss has none.

        The result is a named tuple of tensors whose second axis is the positions; a field may be None.
        Training samples it separately for each block, so it does not depend on the other blocks of a batch.
        """
        return None

    def attach(self, autoencoder: nn.Module) -> None:
        """Receive the model's frozen autoencoder; called once, before its weights are loaded."""
        return

    def attach_backbone(self, backbone: nn.Module) -> None:
        """Receive the model's backbone, as with `attach`; the head may share its `embed_tokens`."""
        return

    def init_from_counts(self, count_tokens: Callable[[], Tensor]) -> None:
        """Initialize from token frequencies in the training text; called once, for a new model.

        Args:
            count_tokens: Returns the counts, (V,); V may be smaller than the head's vocabulary, if that is
                another model's.
        """
        return

    def init_from_neighbours(self, count_neighbours: Callable[[], Tensor]) -> None:
        """Initialize from each token's neighbours in the training text; called before `init_from_counts`.

        Args:
            count_neighbours: Returns how often each token came before and after the most frequent ones,
                (V, N); V may be smaller than the head's vocabulary, if that is another model's.
        """
        return

    def check_loaded(self) -> None:
        """Raise ValueError if the loaded weights are unusable; they are already known to be finite."""
        return

    def embed_chunks(self, chunks_BCK: Tensor) -> Tensor | None:
        """The head's own embedding of each chunk, (B, C, `extra_state_size`), if it has one.

        It is appended to the backbone's states: the D of all methods is hidden size + `extra_state_size`.
        """
        return None

    def boundary_layers(self) -> list[nn.Module]:
        """Layers that touch noise, latents, token embeddings or the vocabulary; Muon leaves them to AdamW."""
        return []

    def check_temperature(self, temperature: float, is_asked: bool = False) -> None:
        """Raise ValueError unless a single draw can have the temperature.

        Args:
            temperature: The temperature.
            is_asked: Whether the head's own sampler was requested; it then must support temperatures, even
                if this one is 1.
        """
        lowest, name = self.config.lowest_temperature, self.config.head_type
        if lowest <= temperature <= 1 and not (is_asked and lowest == 1):
            return
        if lowest == 1:
            raise ValueError(
                f"the {name} head does not take a temperature; use the sampler 'exact' or 'pool'."
            )
        at_zero = "; sampler='pool' gives the most frequent chunk at 0" if lowest > 0 else ""
        raise ValueError(
            f"the {name} head takes temperatures from {lowest:g} to 1, got {temperature:g}{at_zero}."
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
        """Independent draws of the next latent, (N, P, Z), in any float dtype.

        Args:
            prepared_P: Output of `prepare`, or some of its rows.
            num_draws: Number of draws N.
            randomness: Source of the noise: one generator, or one per position.
            noise: Recorded noise to use instead, in the form that the head documents.
            temperature: Always 1 unless the configuration's `lowest_temperature` is lower.
        """

    def attach(self, autoencoder: nn.Module) -> None:
        """See `GenerativeHead`."""
        self._autoencoder = (autoencoder,)  # The tuple keeps it from being registered as a submodule.

    def draw_chunks(
        self, prepared_P: Tensor, num_draws: int, randomness: Randomness = None, temperature: float = 1.0
    ) -> Tensor:
        """See `GenerativeHead`; the autoencoder decodes the latents."""
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
    """Statistics of each token's distribution given all tokens before it, for the tokens of some chunks.

    Args:
        of_token_PK: Probability of the token.
        of_pair_PK: Probability that two draws of the token agree: the sum of squared probabilities.
        highest_PK: Probability of the likeliest token.
    """

    of_token_PK: Tensor
    of_pair_PK: Tensor
    highest_PK: Tensor


@runtime_checkable
class Likelihood(Protocol):
    """A head that can compute the probability of any chunk."""

    def token_losses(self, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
        """Cross-entropy of each token of the chunks given all tokens before it, in nats, (P, K)."""

    def token_probabilities(
        self, states_PD: Tensor, tokens_PK: Tensor, temperature: float = 1.0
    ) -> TokenProbabilities:
        """Statistics of each token's distribution given all tokens before it, (P, K) each.

        Args:
            states_PD: States of the preceding chunks.
            tokens_PK: The chunks.
            temperature: Sampling temperature, from `MIN_TEMPERATURE` to 1, for heads that take one.
        """


class TokenDistribution(NamedTuple):
    """Distributions of a token, one per row, over the whole vocabulary or a part of it.

    Args:
        p_MS: Probabilities, which add up to 1 in each row.
        vocab_size: Number of tokens in the vocabulary V.
        tokens_MS: Their tokens; None if they are all tokens, in order. The probabilities of a token that
            occurs twice add up.
    """

    p_MS: Tensor
    vocab_size: int
    tokens_MS: Tensor | None = None

    def row(self, index: int) -> "TokenDistribution":
        """One row."""
        tokens_MS = None if self.tokens_MS is None else self.tokens_MS[index : index + 1]
        return TokenDistribution(self.p_MS[index : index + 1], self.vocab_size, tokens_MS)

    def over_vocabulary(self) -> Tensor:
        """Probabilities of all tokens, (M, V)."""
        if self.tokens_MS is None:
            return self.p_MS
        p_MV = self.p_MS.new_zeros(len(self.p_MS), self.vocab_size)
        return p_MV.scatter_add_(1, self.tokens_MS, self.p_MS)


@runtime_checkable
class TokenDistributions(Protocol):
    """A head that knows from which distribution it draws each token, which drafts need."""

    def draft_distribution(
        self, prepared_P: Tensor, tokens_PK: Tensor, place: int, temperature: float = 1.0
    ) -> TokenDistribution:
        """Distribution of the token at one position of each chunk, given the tokens before it, in P rows.

        It may leave out unlikely tokens: a draft can be drawn from any distribution.

        Args:
            prepared_P: Output of `prepare` for the states of the preceding chunks, or some of its rows.
            tokens_PK: The chunks; tokens from that position on are ignored.
            place: Position inside the chunk, from 0.
            temperature: As in `Likelihood.token_probabilities`.
        """


@runtime_checkable
class Distillable(Protocol):
    """A head that can be distilled from a teacher's token distributions (docs/uptraining.md)."""

    def distillation_losses(self, states_PD: Tensor, tokens_PK: Tensor, soft_targets: SoftTargets) -> Tensor:
        """Distillation loss of each token of the chunks, (P, K); see `calm.core.distillation`.

        Args:
            states_PD: States of the preceding chunks.
            tokens_PK: The chunks.
            soft_targets: The teacher's predictions of the P·K tokens, each given all tokens before it.
        """


_traced: ContextVar[list[Tensor] | None] = ContextVar("traced", default=None)


@contextmanager
def traced_checks() -> Iterator[list[Tensor]]:
    """Collect the results of `require_finite` as tensors, while a draw is traced."""
    checks: list[Tensor] = []
    token = _traced.set(checks)
    try:
        yield checks
    finally:
        _traced.reset(token)


def require_finite(drawn: Tensor) -> None:
    """Raise NotFiniteError if drawn latents or logits are not finite; see `traced_checks` for tracing."""
    is_finite = drawn.isfinite().all()
    if (checks := _traced.get()) is not None:
        checks.append(is_finite)
    elif not bool(is_finite):
        raise_not_finite(drawn.dtype)


def raise_not_finite(dtype: torch.dtype) -> NoReturn:
    """Raise the error for a draw that is not finite."""
    raise NotFiniteError(
        f"the head drew a latent or score that is not finite (in {dtype}); "
        "the weights may be damaged, or the dtype too narrow for them."
    )
