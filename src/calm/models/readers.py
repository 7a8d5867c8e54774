"""Models as scoring sees them: units of K tokens in, one output per unit, from which the next unit is drawn.

A unit is a chunk of a CALM, or a single token.

Shapes: B batch, T tokens, U units (T = U·K), P positions, X output size, N draws, K tokens per unit.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from calm.core.samplers import HeadSampler, PoolSampler, Sampler, is_plain_draw
from calm.errors import NotFiniteError
from calm.models.caches import CACHE
from calm.models.calm import CalmForCausalLM
from calm.models.heads import Likelihood
from calm.models.heads.contract import MIN_TEMPERATURE

NO_DISTRIBUTION = (
    "the model's probabilities of the next token are not finite; the weights may be damaged, or the dtype "
    "too narrow for them."
)


class Reader(Protocol):
    """A model that generates units of K tokens."""

    unit_size: int
    model: Any

    def new_cache(self) -> DynamicCache:
        """An empty cache."""

    def read(
        self, tokens_BT: Tensor, mask: Tensor | None, position_BU: Tensor, cache: Cache | None
    ) -> Tensor:
        """One output per unit, (B, U, X), continuing from the cache.

        Args:
            tokens_BT: Tokens.
            mask: Added to attention scores, (B, 1, U, all units); None for a text read from its start.
            position_BU: Position of each unit.
            cache: Cache of earlier units.
        """

    def draw(self, outputs_PX: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
        """Independent draws of the unit after each output, (N, P, K)."""

    @property
    def mean_draws(self) -> float:
        """Mean number of the head's draws per unit sampled so far."""


@runtime_checkable
class LikelihoodReader(Reader, Protocol):
    """A reader that knows the probabilities of its draws."""

    def losses(self, outputs_PX: Tensor, units_PK: Tensor) -> Tensor:
        """Cross-entropy of each token of a unit given all before it, at T = 1, in nats, (P, K)."""

    def probabilities(self, outputs_PX: Tensor, units_PK: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of each token of a unit given all before it, and of two draws agreeing, (P, K) each."""


class ChunkReader:
    """A CALM, read chunk by chunk.

    Args:
        model: The model.
        sampler: How chunks are sampled; one draw at T = 1 when None.
    """

    def __init__(self, model: CalmForCausalLM, sampler: Sampler | None = None) -> None:
        self.model, self.sampler = model, sampler or PoolSampler()
        self.unit_size = model.config.chunk_size
        self._num_drawn = self._num_samples = 0

    def new_cache(self) -> DynamicCache:
        """See `Reader`."""
        return DynamicCache(config=self.model.config.backbone)

    def read(
        self, tokens_BT: Tensor, mask: Tensor | None, position_BU: Tensor, cache: Cache | None
    ) -> Tensor:
        """See `Reader`; the outputs are the states of the chunks."""
        return self.model.forward_chunks(tokens_BT, mask, position_BU, cache)

    def draw(self, outputs_PX: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
        """See `Reader`."""
        if is_plain_draw(self.sampler):
            self._num_drawn, self._num_samples = self._num_drawn + 1, self._num_samples + 1
            return self.model.draw_chunks(outputs_PX, num_draws, generator)
        samples = [self.model.sample_chunks(outputs_PX, self.sampler, generator) for _ in range(num_draws)]
        self._num_drawn += sum(int(sample.num_draws_R.sum()) for sample in samples)
        self._num_samples += num_draws * len(outputs_PX)
        return torch.stack([sample.chunks_RK for sample in samples])

    @property
    def mean_draws(self) -> float:
        """See `Reader`."""
        return self._num_drawn / max(self._num_samples, 1)


class LikelihoodChunkReader(ChunkReader):
    """A CALM whose draws have known probabilities: at T = 1, or at a temperature that its head takes."""

    @staticmethod
    def fits(model: CalmForCausalLM, sampler: Sampler | None) -> bool:
        """Whether the probabilities of the model's draws with this sampler are known."""
        if not isinstance(model.head, Likelihood):
            return False
        is_head_sampler = isinstance(sampler, HeadSampler) and sampler.temperature >= MIN_TEMPERATURE
        return sampler is None or is_plain_draw(sampler) or is_head_sampler

    def losses(self, outputs_PX: Tensor, units_PK: Tensor) -> Tensor:
        """See `LikelihoodReader`."""
        return self._likelihood.token_losses(outputs_PX, units_PK)

    def probabilities(self, outputs_PX: Tensor, units_PK: Tensor) -> tuple[Tensor, Tensor]:
        """See `LikelihoodReader`."""
        probabilities = self._likelihood.token_probabilities(outputs_PX, units_PK, self.sampler.temperature)
        return probabilities.of_token_PK, probabilities.of_pair_PK

    @property
    def _likelihood(self) -> Likelihood:
        head = self.model.head
        assert isinstance(head, Likelihood)
        return head


class TokensReader:
    """A token-level causal language model; the outputs are its logits for the next token.

    Args:
        model: The model.
        temperature: Divides the logits; above 0.
    """

    unit_size = 1
    mean_draws = 1.0

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0) -> None:
        self.model: Any = model
        self.temperature = temperature

    def new_cache(self) -> DynamicCache:
        """See `Reader`."""
        return DynamicCache()  # Without sliding windows: branches must see all keys.

    def read(
        self, tokens_BT: Tensor, mask: Tensor | None, position_BU: Tensor, cache: Cache | None
    ) -> Tensor:
        """See `Reader`."""
        return self.model(
            input_ids=tokens_BT,
            attention_mask=mask,
            position_ids=position_BU,
            use_cache=cache is not None,
            **{CACHE: cache},
        ).logits

    def draw(self, outputs_PX: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
        """See `Reader`."""
        p_PV = self.distribution(outputs_PX)
        tokens_PN = torch.multinomial(p_PV, num_draws, replacement=True, generator=generator)
        return tokens_PN.T.unsqueeze(-1)

    def distribution(self, outputs_PX: Tensor) -> Tensor:
        """Probabilities of the next token, (P, V).

        Raises:
            NotFiniteError: If they are not finite.
        """
        p_PV = (outputs_PX.float() / self.temperature).softmax(-1)
        if not bool(p_PV.isfinite().all()):
            raise NotFiniteError(NO_DISTRIBUTION)
        return p_PV

    def losses(self, outputs_PX: Tensor, units_PK: Tensor) -> Tensor:
        """See `LikelihoodReader`."""
        return -outputs_PX.float().log_softmax(-1).gather(1, units_PK)

    def probabilities(self, outputs_PX: Tensor, units_PK: Tensor) -> tuple[Tensor, Tensor]:
        """See `LikelihoodReader`."""
        p_PV = self.distribution(outputs_PX)
        return p_PV.gather(1, units_PK), p_PV.square().sum(-1, keepdim=True)
