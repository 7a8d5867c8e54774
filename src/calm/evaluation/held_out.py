"""All figures of a model on held-out text, with the n-gram floors on the same chunks."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from calm.evaluation.brier import Block, BrierResult, CalmSampler, evaluate_brier
from calm.evaluation.ngram import NGramSampler
from calm.evaluation.reconstruction import ReconstructionResult, evaluate_reconstruction
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM

EVALUATION_SEED = 1234  # The same draws at every evaluation, so that checkpoints compare.
_BATCH = 8


@dataclass(frozen=True)
class Scorecard:
    """Figures on one held-out text.

    Args:
        reconstruction: Of the autoencoder.
        brier: Of the language model.
        floors: Of n-gram models, by name.
    """

    reconstruction: ReconstructionResult
    brier: BrierResult
    floors: dict[str, BrierResult] = field(default_factory=dict)


def batches_of(
    blocks: datasets.Dataset, num_blocks: int | None = None, device: torch.device | str = "cpu"
) -> Iterator[Block]:
    """Blocks in batches on a device; the first `num_blocks` of them, or all."""
    end = len(blocks) if num_blocks is None else min(num_blocks, len(blocks))
    for start in range(0, end, _BATCH):
        batch = blocks[start : min(start + _BATCH, end)]
        yield {name: column.to(device) for name, column in batch.items()}


def score_reconstruction(
    autoencoder: CalmAutoencoder,
    blocks: datasets.Dataset,
    num_blocks: int | None = None,
    seed: int = EVALUATION_SEED,
) -> ReconstructionResult:
    """Reconstruction of held-out blocks."""
    generator = torch.Generator(autoencoder.device).manual_seed(seed)
    return evaluate_reconstruction(autoencoder, batches_of(blocks, num_blocks, autoencoder.device), generator)


def score_brier(
    model: CalmForCausalLM,
    blocks: datasets.Dataset,
    num_blocks: int | None = None,
    seed: int = EVALUATION_SEED,
) -> BrierResult:
    """BrierLM on held-out blocks."""
    return evaluate_brier(
        CalmSampler(model),
        batches_of(blocks, num_blocks, model.device),
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id or 0,
        generator=torch.Generator(model.device).manual_seed(seed),
    )


def score_ngrams(
    orders: list[int],
    training_documents: list[list[int]],
    blocks: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    chunk_size: int,
    num_blocks: int | None = None,
    seed: int = EVALUATION_SEED,
) -> dict[str, BrierResult]:
    """BrierLM of n-gram models of the training documents, on the same blocks."""
    floors = {}
    for order in orders:
        sampler = NGramSampler(
            training_documents,
            order=order,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            chunk_size=chunk_size,
        )
        floors[f"{order}-gram"] = evaluate_brier(
            sampler,
            batches_of(blocks, num_blocks),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            generator=torch.Generator().manual_seed(seed),
        )
    return floors
