"""Perplexity of models that have probabilities, on the tokens that BrierLM scores.

Shapes: P targets, K tokens per chunk, M tokens that count.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.core.brier import window_of
from calm.core.chunks import is_after_eos
from calm.errors import InputError
from calm.evaluation.branches import read_text
from calm.evaluation.brier import Targets, targets_of
from calm.evaluation.ngram import NGramSampler
from calm.evaluation.processes import Batch, add_over_processes
from calm.models.language_model import language_model
from calm.models.readers import LikelihoodReader


@dataclass(frozen=True)
class PerplexityResult:
    """Cross-entropy of held-out text.

    Args:
        cross_entropy: Nats per token.
        num_tokens: Number of tokens it is averaged over, including ends of text.
    """

    cross_entropy: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the cross-entropy; infinite beyond the range of a float, from 710 nats on."""
        try:
            return math.exp(self.cross_entropy)
        except OverflowError:
            return math.inf


@torch.no_grad()
def evaluate_perplexity(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    eos_token_id: int | list[int] | None,
    pad_token_id: int,
) -> PerplexityResult:
    """Cross-entropy of a model with a likelihood, on the text as laid out in blocks.

    Args:
        model: The model.
        batches: Held-out blocks in chunks of `window_of(K)` tokens, as for BrierLM.
        eos_token_id: Ids that end a text.
        pad_token_id: Padding after the end.

    Raises:
        InputError: If the model has no likelihood, or the blocks contain no target.
    """
    reader = language_model(model).reader()
    if not isinstance(reader, LikelihoodReader):
        raise InputError(f"a {type(model).__name__} with this head has no likelihood, and so no perplexity.")
    size = window_of(reader.unit_size)

    def losses_of(batch: Batch, targets: Targets) -> Tensor:
        text = read_text(reader, batch, targets.is_target_BC, size)
        units = targets.chunks_PK.split(reader.unit_size, dim=-1)
        return torch.cat(
            [reader.losses(text.outputs_on_text(step), unit_PK) for step, unit_PK in enumerate(units)], dim=-1
        )

    return _mean_loss(
        losses_of, targets_of(batches, size, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
    )


def evaluate_ngram_perplexity(ngrams: NGramSampler, batches: Iterable[Batch]) -> PerplexityResult:
    """Cross-entropy of an n-gram model on the same tokens.

    Args:
        ngrams: The model.
        batches: Held-out blocks in chunks of the model's `chunk_size`.

    Raises:
        InputError: If the blocks contain no target.
    """
    return _mean_loss(
        lambda batch, targets: ngrams.losses(batch, targets.is_target_BC, targets.chunks_PK),
        targets_of(
            batches,
            ngrams.chunk_size,
            eos_token_id=ngrams.eos_token_id,
            pad_token_id=ngrams.pad_token_id,
        ),
    )


def _mean_loss(
    losses_of: Callable[[Batch, Targets], Tensor], batches: Iterable[tuple[int, Batch, Targets]]
) -> PerplexityResult:
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.long)
    for _, batch, targets in batches:
        losses_M = losses_of(batch, targets)[~is_after_eos(targets.chunks_PK, targets.eos_ids)]
        total, count = total + losses_M.double().sum().cpu(), count + len(losses_M)
    total, count = add_over_processes([total, count])
    if count == 0:
        raise InputError("the held-out text has no token to score; give more text.")
    return PerplexityResult(float(total / count), int(count))
