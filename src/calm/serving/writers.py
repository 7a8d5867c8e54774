"""The models behind the API: a CALM, or a token-level model that a CALM drafts for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel

from calm.core.samplers import Sampler
from calm.models.calm import CalmForCausalLM
from calm.models.drafting.batching import DraftedBatch, TokenSampler
from calm.models.generation.batching import BatchLimits, ChunkBatch
from calm.models.generation.rows import Failed, Row, Written
from calm.models.generation.sampling import check_sampler
from calm.models.thoughts import Thoughts
from calm.serving.errors import ApiError
from calm.serving.protocol import SamplingRequest, setting_error
from calm.serving.settings import ServerSettings

AnySampler = Sampler | TokenSampler


class Batch(Protocol):
    """Texts that are generated together; see `ChunkBatch`."""

    def join(
        self,
        prompt: Sequence[int],
        sampler: Any,
        budget: int,
        seed: int,
        copy: int = 0,
        thoughts: Thoughts | None = None,
    ) -> Row:
        """Add a row."""

    def step(self) -> list[Written | Failed]:
        """Advance some rows by one step."""

    def drop(self, row: Row) -> None:
        """Remove a row before it has ended."""


class Writer(Protocol):
    """A model, and how to generate with it."""

    @property
    def model(self) -> PreTrainedModel:
        """The model that texts are sampled from."""

    def new_batch(self, limits: BatchLimits) -> Batch:
        """An empty batch."""

    def sampler_for(self, request: SamplingRequest, settings: ServerSettings) -> AnySampler:
        """The sampler for a request.

        Raises:
            ApiError: If the request asks for something unsupported.
        """


@dataclass(frozen=True)
class ChunkWriter:
    """A CALM.

    Args:
        model: The model.
    """

    model: CalmForCausalLM

    def new_batch(self, limits: BatchLimits) -> Batch:
        """See `Writer`."""
        return ChunkBatch(self.model, limits)

    def sampler_for(self, request: SamplingRequest, settings: ServerSettings) -> Sampler:
        """See `Writer`."""
        head = self.model.head
        sampler = request.sampler_for(head.config, settings.temperature, settings.draws)
        try:
            check_sampler(head, sampler)
        except ValueError as error:
            raise ApiError(str(error), param="sampler") from error
        return sampler


@dataclass(frozen=True)
class DraftedWriter:
    """A token-level model, and a CALM that drafts for it.

    Args:
        model: The target model.
        draft: The draft model.
        num_chunks: Chunks per draft.
    """

    model: PreTrainedModel
    draft: CalmForCausalLM
    num_chunks: int = 1

    def new_batch(self, limits: BatchLimits) -> Batch:
        """See `Writer`."""
        tokens = limits.chunks_at_once * self.draft.config.chunk_size
        return DraftedBatch(self.model, self.draft, self.num_chunks, limits.max_rows, tokens)

    def sampler_for(self, request: SamplingRequest, settings: ServerSettings) -> TokenSampler:
        """See `Writer`."""
        for name in ("sampler", "num_draws", "max_draws"):
            if getattr(request, name) is not None:
                raise ApiError(
                    f"'{name}' applies only to models that generate chunks, and this one generates "
                    "tokens; leave it out.",
                    param=name,
                )
        try:
            return TokenSampler(
                temperature=settings.temperature if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                min_p=request.min_p or 0.0,
            )
        except ValueError as error:
            raise setting_error(error) from error
