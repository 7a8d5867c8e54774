"""BrierLM of anything that can sample the next chunk (paper section 4).

Shapes: B batch, T tokens, K tokens per chunk, C chunks, P target chunks, N draws.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from calm.core.brier import (
    NUM_ORDERS,
    DocumentSums,
    brier_lm,
    brier_lm_error,
    share_of_equal_pairs,
    share_of_hits,
    undefined_brier_lm,
)
from calm.core.chunks import as_id_tensor, end_after_eos, find_targets, number_documents, split_into_chunks
from calm.core.seeds import as_seed
from calm.errors import InputError
from calm.evaluation.processes import Batch, batches_of_process, gather_from_processes


class ChunkSampler(Protocol):
    """Samples next chunks given the true chunks before them; `FromDraws` scores it."""

    chunk_size: int

    def draw_next_chunks(
        self, batch: Batch, is_target_BC: Tensor, num_draws: int, generator: torch.Generator
    ) -> Tensor:
        """Independent draws for every target chunk, (N, P, K), in the order of `is_target_BC`.

        Args:
            batch: Blocks of text, (B, T).
            is_target_BC: Which of chunks 1..C-1 to draw.
            num_draws: Number of draws N.
            generator: Source of randomness.
        """


@dataclass(frozen=True)
class Targets:
    """The chunks of a batch of blocks that are scored, and how texts end.

    Args:
        is_target_BC: Which of chunks 1..C-1 are scored.
        chunks_PK: Their tokens, with padding after EOS.
        eos_ids: Ids that end a text.
        pad_token_id: Padding after the end.
    """

    is_target_BC: Tensor
    chunks_PK: Tensor
    eos_ids: Tensor
    pad_token_id: int

    def end(self, chunk_PK: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks with padding after EOS, and which of them contain EOS."""
        return end_after_eos(chunk_PK, self.eos_ids, self.pad_token_id)


@runtime_checkable
class Scorer(Protocol):
    """Estimates the two terms of Brier scores."""

    chunk_size: int

    def estimate(
        self, batch: Batch, targets: Targets, num_draws: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Unbiased estimates of P(y) and sum_x P(x)^2 for the first 1..K tokens of every target, (P, K).

        Args:
            batch: Blocks of text, (B, T).
            targets: The chunks to score.
            num_draws: Draws per target, for scorers that use draws.
            generator: Source of randomness.
        """


class FromDraws:
    """Scores anything that draws chunks.

    Args:
        sampler: The sampler to score.
    """

    def __init__(self, sampler: ChunkSampler) -> None:
        self.sampler, self.chunk_size = sampler, sampler.chunk_size

    def estimate(
        self, batch: Batch, targets: Targets, num_draws: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See `Scorer`."""
        draws_NPK = self.sampler.draw_next_chunks(batch, targets.is_target_BC, num_draws, generator)
        draws_NPK, _ = targets.end(draws_NPK)
        return share_of_hits(draws_NPK, targets.chunks_PK), share_of_equal_pairs(draws_NPK)


@dataclass(frozen=True)
class BrierResult:
    """Mean scores over held-out chunks.

    Args:
        means: Brier-1 to Brier-K, as fractions.
        num_chunks: Number of scored chunks.
        context: Tokens per block; scores with different contexts are not comparable.
        errors: Standard errors of the means, as fractions, with documents as the sample; NaN for a single
            document.
        brier_lm_error: Standard error of BrierLM (delta method), in percent as `brier_lm` is; NaN if BrierLM
            is undefined.
        hits: Means of P(y), the probability of drawing the text's next n tokens, n = 1..K; fractions.
        collisions: Means of sum_x P(x)^2, the probability that two draws agree; fractions. Brier-n is 2 hit -
            collision.
        documents: Sums of Brier-1 to Brier-K, as fractions, by document, for
            `calm.core.brier.brier_lm_difference`.
    """

    means: tuple[float, ...]
    num_chunks: int
    context: int
    errors: tuple[float, ...] = ()
    brier_lm_error: float = math.nan
    hits: tuple[float, ...] = ()
    collisions: tuple[float, ...] = ()
    documents: DocumentSums | None = field(default=None, repr=False, compare=False)

    @property
    def brier_lm(self) -> float:
        """BrierLM in percent; 0 if undefined."""
        return brier_lm(self.means)

    @property
    def undefined(self) -> str | None:
        """Why BrierLM is undefined, such as "Brier-4 below 0"; None if it is defined."""
        return undefined_brier_lm(self.means)

    def as_metrics(self) -> dict[str, float]:
        """BrierLM and Brier-1..4 in percent, under short names."""
        orders = {f"brier_{i + 1}": 100 * mean for i, mean in enumerate(self.means[:NUM_ORDERS])}
        return {"brier_lm": self.brier_lm, **orders}

    def as_errors(self) -> dict[str, float]:
        """Standard errors under the names of `as_metrics`, in percent."""
        orders = {f"brier_{i + 1}": 100 * error for i, error in enumerate(self.errors[:NUM_ORDERS])}
        return {"brier_lm": self.brier_lm_error, **orders}


@torch.no_grad()
def evaluate_brier(
    scorer: Scorer,
    batches: Iterable[Batch],
    *,
    eos_token_id: int | list[int] | None,
    pad_token_id: int,
    seed: int,
    num_draws: int = 2,
) -> BrierResult:
    """Brier-1..K of a model over all target chunks.

    Whatever follows EOS in a chunk is padding, in draws and text alike, so the end of a text is an
    outcome like any other, and all models are scored on the same outcomes. In a process group, each process
    scores its share of the batches, and all return the result of a single process.

    Args:
        scorer: What to score: `FromDraws(sampler)` for anything that draws chunks, or another scorer.
        batches: Held-out blocks, in batches.
        eos_token_id: Ids that end a text.
        pad_token_id: Padding after the end.
        seed: Seed of the draws; every batch has its own stream.
        num_draws: Draws per target, at least 2; more lower the variance and leave the mean unchanged.

    Raises:
        InputError: If K < 4, there are fewer than two draws, or the blocks contain no target.
    """
    if not isinstance(scorer, Scorer):
        raise InputError(
            f"a {type(scorer).__name__} has no estimate() method; wrap it in FromDraws(sampler)."
        )
    size = scorer.chunk_size
    if size < NUM_ORDERS:
        raise InputError(
            f"BrierLM needs outcomes of at least {NUM_ORDERS} tokens, but this sampler draws only {size} at "
            "a time; score it step by step, with calm.evaluation.steps.DrawScorer."
        )
    if num_draws < 2:
        raise InputError(f"a Brier score needs at least two draws, got num_draws={num_draws}.")
    parts: list[tuple[int, int, DocumentSums]] = []
    for index, batch, targets in targets_of(
        batches, size, eos_token_id=eos_token_id, pad_token_id=pad_token_id
    ):
        # A random stream per batch: which process scores it, and what came before, do not matter.
        generator = torch.Generator(targets.chunks_PK.device).manual_seed(_seed_of_batch(seed, index))
        hit_PK, equal_PK = scorer.estimate(batch, targets, num_draws, generator)
        document_P = _documents_of(batch, index)[:, 1:][targets.is_target_BC]
        sums = DocumentSums.of_positions(torch.cat([hit_PK, equal_PK], dim=1), document_P)
        parts.append((index, batch["input_ids"].shape[-1], sums))
    # In batch order, so that the number of processes does not change a digit.
    parts = sorted(gather_from_processes(parts), key=lambda part: part[0])
    if not parts:
        raise InputError("the held-out text has no chunk to score; give more text.")
    sums = DocumentSums.concat([part[2] for part in parts])
    hit_K, equal_K = sums.means_X.chunk(2)
    # Brier = 2 hit - collision; the covariance follows by the same linear map.
    combine_KX = torch.cat([2 * torch.eye(size), -torch.eye(size)], dim=1).double()
    means_K, covariance_KK = 2 * hit_K - equal_K, combine_KX @ sums.covariance_XX @ combine_KX.T
    return BrierResult(
        means=tuple(means_K.tolist()),
        num_chunks=sums.num_positions,
        context=parts[0][1],
        errors=tuple(covariance_KK.diagonal().clamp_min(0).sqrt().tolist()),
        brier_lm_error=brier_lm_error(means_K, covariance_KK),
        hits=tuple(hit_K.tolist()),
        collisions=tuple(equal_K.tolist()),
        documents=DocumentSums(sums.document_D, sums.count_D, sums.total_DX @ combine_KX.T),
    )


def targets_of(
    batches: Iterable[Batch], chunk_size: int, *, eos_token_id: int | list[int] | None, pad_token_id: int
) -> Iterator[tuple[int, Batch, Targets]]:
    """This process's share of the batches, those with targets, each with its index."""
    for index, batch in batches_of_process(batches):
        is_target_BC = find_targets(batch["labels"], batch["position_ids"], chunk_size)
        if bool(is_target_BC.any()):
            tokens = batch["input_ids"]
            eos_ids = as_id_tensor(eos_token_id, tokens.device)
            chunks_PK = split_into_chunks(tokens, chunk_size)[:, 1:][is_target_BC]
            chunks_PK, _ = end_after_eos(chunks_PK, eos_ids, pad_token_id)
            yield index, batch, Targets(is_target_BC, chunks_PK, eos_ids, pad_token_id)


def _documents_of(batch: Batch, index: int) -> Tensor:
    """Document number of each chunk, (B, C); without `document_ids`, no document spans two blocks."""
    if "document_ids" in batch:
        return batch["document_ids"]
    return number_documents(batch["position_ids"]) + (index << 32)


def _seed_of_batch(seed: int, index: int) -> int:
    return (as_seed(seed) * 1_000_003 + index) % 2**63
