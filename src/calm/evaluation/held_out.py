"""All scores of a model on held-out text, with floors and ceilings on the same chunks."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel

from calm.core.seeds import as_seed
from calm.data.chunking import BlockSettings, Layout
from calm.data.prepared import PreparedData
from calm.errors import InputError
from calm.evaluation.brier import BrierResult, FromDraws, Scorer, evaluate_brier
from calm.evaluation.ngram import NGramCounts, NGramSampler
from calm.evaluation.perplexity import PerplexityResult, evaluate_ngram_perplexity, evaluate_perplexity
from calm.evaluation.processes import Batch
from calm.evaluation.reconstruction import ReconstructionResult, evaluate_reconstruction
from calm.evaluation.scorers import AutoencoderCeiling, Estimator, scorer_of
from calm.hardware import fast_float32, width_of
from calm.models.autoencoder import CalmAutoencoder
from calm.models.context import check_context
from calm.models.language_model import language_model
from calm.progress import track

logger = logging.getLogger(__name__)
EVALUATION_SEED = 1234  # The same seed at every evaluation, so that checkpoints are comparable.
_BATCH_SIZE = 8
_TOKENS_AT_ONCE = 8192
_BYTES_OF_COUNTS = 200  # Per training token.
_MAX_COUNTED = 20_000_000  # Training tokens, for floors that were not asked for.


@dataclass(frozen=True)
class Scorecard:
    """Scores on one held-out text.

    Args:
        name: Kind of model, "CALM" or "autoregressive".
        brier: Brier scores of the language model.
        reconstruction: Reconstruction by the autoencoder, if there is one.
        perplexity: Perplexity, if the model has a likelihood.
        floors: Brier scores of n-gram models, by name.
        floor_perplexities: Perplexities of the same n-gram models.
        ceilings: Brier scores that a perfect language model would reach, by name.
        layout: How the documents were aligned to chunks.
    """

    name: str
    brier: BrierResult
    reconstruction: ReconstructionResult | None = None
    perplexity: PerplexityResult | None = None
    floors: dict[str, BrierResult] = field(default_factory=dict)
    floor_perplexities: dict[str, PerplexityResult] = field(default_factory=dict)
    ceilings: dict[str, BrierResult] = field(default_factory=dict)
    layout: Layout = "documents"


def score_model(
    model: PreTrainedModel,
    data: PreparedData,
    settings: BlockSettings,
    *,
    ngrams: Sequence[int] | None = None,
    num_blocks: int | None = None,
    seed: int = EVALUATION_SEED,
    num_draws: int = 2,
    estimator: Estimator = "best",
) -> Scorecard:
    """Compute all scores of a model on the held-out part of prepared text.

    Args:
        model: A CALM, or any causal language model of transformers.
        data: Text tokenized for the model.
        settings: How the text is laid out in blocks; for a run, `calm.training.blocks.block_settings`.
        ngrams: Orders of n-gram floors; needs training text.
        num_blocks: Maximum number of blocks to score.
        seed: Seed of the draws.
        num_draws: Draws per target.
        estimator: Whether to use the probabilities of a model that has them.

    Raises:
        InputError: If there is no text to score, or none to count n-grams in.
    """
    if ngrams and len(data.train) == 0:
        raise InputError("n-gram floors need training text; give a folder made by `calm prepare` as data.")
    view, size = language_model(model), scorer_of(model).chunk_size
    check_context(model.config, settings.block_size)
    blocks = data.blocks("validation", chunk_size=size, **dataclasses.asdict(settings))
    floors, floor_perplexities = dict[str, BrierResult](), dict[str, PerplexityResult]()
    for name, ngram_model in ngram_models(ngrams or [], data, size):
        floors[name] = score_ngrams_brier(ngram_model, blocks, num_blocks, seed)
        floor_perplexities[name] = score_ngrams_perplexity(ngram_model, blocks, num_blocks)
    with fast_float32(model.device, width_of(model.config)):
        brier = score_brier(model, blocks, num_blocks, seed, num_draws=num_draws, estimator=estimator)
        perplexity = score_perplexity(model, blocks, num_blocks) if view.has_likelihood else None
    card = Scorecard(
        view.kind,
        brier,
        perplexity=perplexity,
        floors=floors,
        floor_perplexities=floor_perplexities,
        layout=settings.layout,
    )
    if view.autoencoder is None:
        return card
    return dataclasses.replace(
        card,
        reconstruction=score_reconstruction(view.autoencoder, blocks, num_blocks, seed),
        ceilings={"ceiling": score_ceiling(model, view.autoencoder, blocks, num_blocks, seed)},
    )


def batches_of(
    blocks: datasets.Dataset,
    num_blocks: int | None = None,
    device: torch.device | str = "cpu",
    *,
    label: str = "scoring",
) -> Iterator[Batch]:
    """Yield batches on a device, of the first `num_blocks` blocks or all.

    Args:
        blocks: The blocks.
        num_blocks: Maximum number of blocks.
        device: Device of the batches.
        label: Label of the progress bar.
    """
    end = len(blocks) if num_blocks is None else min(num_blocks, len(blocks))
    size = _BATCH_SIZE
    if end:
        size = max(1, min(_BATCH_SIZE, _TOKENS_AT_ONCE // blocks[0]["input_ids"].shape[-1]))
    for start in track(range(0, end, size), label, "batch"):
        batch = blocks[start : min(start + size, end)]
        yield {name: column.to(device) for name, column in batch.items()}


def score_reconstruction(
    autoencoder: CalmAutoencoder,
    blocks: datasets.Dataset,
    num_blocks: int | None = None,
    seed: int = EVALUATION_SEED,
) -> ReconstructionResult:
    """Reconstruction of held-out blocks."""
    generator = torch.Generator(autoencoder.device).manual_seed(as_seed(seed))
    batches = batches_of(blocks, num_blocks, autoencoder.device, label="scoring the autoencoder")
    return evaluate_reconstruction(autoencoder, batches, generator)


def score_brier(
    model: PreTrainedModel,
    blocks: datasets.Dataset,
    num_blocks: int | None = None,
    seed: int = EVALUATION_SEED,
    *,
    num_draws: int = 2,
    estimator: Estimator = "best",
) -> BrierResult:
    """BrierLM of a model on held-out blocks, laid out in the chunks of `scorer_of(model)`."""
    return score_with(scorer_of(model, estimator), model, blocks, num_blocks, seed, num_draws)


def score_ceiling(
    model: PreTrainedModel,
    autoencoder: CalmAutoencoder,
    blocks: datasets.Dataset,
    num_blocks: int | None = None,
    seed: int = EVALUATION_SEED,
) -> BrierResult:
    """BrierLM of a model's true next latents, decoded, on the same blocks."""
    ceiling = AutoencoderCeiling(autoencoder, scorer_of(model).chunk_size)
    return score_with(FromDraws(ceiling), model, blocks, num_blocks, seed, label="scoring the ceiling")


def score_with(
    scorer: Scorer,
    model: PreTrainedModel,
    blocks: datasets.Dataset,
    num_blocks: int | None = None,
    seed: int = EVALUATION_SEED,
    num_draws: int = 2,
    *,
    label: str = "scoring BrierLM",
) -> BrierResult:
    """BrierLM from any scorer, with a model's special tokens, on blocks laid out in the scorer's chunks."""
    return evaluate_brier(
        scorer,
        batches_of(blocks, num_blocks, model.device, label=label),
        **special_token_ids(model),
        seed=seed,
        num_draws=num_draws,
    )


def special_token_ids(model: PreTrainedModel) -> dict[str, Any]:
    """Ids that end a text, and the padding id, as keyword arguments of the scoring functions."""
    return {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id or 0}


def score_perplexity(
    model: PreTrainedModel, blocks: datasets.Dataset, num_blocks: int | None = None
) -> PerplexityResult:
    """Perplexity, on held-out blocks laid out as for BrierLM, of a model with a likelihood."""
    return evaluate_perplexity(
        model,
        batches_of(blocks, num_blocks, model.device, label="scoring perplexity"),
        **special_token_ids(model),
    )


def affordable_orders(orders: Sequence[int], data: PreparedData) -> Sequence[int]:
    """Orders of the n-gram floors shown by default: none if the training text is too long to count."""
    num_tokens = data.counts().tokens["train"]
    if not orders or num_tokens <= _MAX_COUNTED:
        return orders
    logger.info(
        "no n-gram floors: the training text has %s tokens, which would take about %s GiB; "
        "`calm evaluate --ngrams` counts them all the same",
        f"{num_tokens:,}",
        f"{num_tokens * _BYTES_OF_COUNTS / 2**30:.0f}",
    )
    return []


def ngram_models(
    orders: Sequence[int], data: PreparedData, chunk_size: int
) -> list[tuple[str, NGramSampler]]:
    """N-gram models of the training text with their names."""
    if not orders:
        return []
    stream, lengths = map(torch.from_numpy, data.training_stream())
    counts = NGramCounts(stream, lengths, order=max(orders), vocab_size=data.vocab_size)
    special_ids = {"eos_token_id": data.tokenizer.eos_token_id, "pad_token_id": data.tokenizer.pad_token_id}
    return [
        (f"{order}-gram", NGramSampler(counts, order=order, chunk_size=chunk_size, **special_ids))
        for order in orders
    ]


def score_ngrams_brier(
    ngrams: NGramSampler,
    blocks: datasets.Dataset,
    num_blocks: int | None = None,
    seed: int = EVALUATION_SEED,
) -> BrierResult:
    """BrierLM of an n-gram model, on the same blocks as the model's."""
    return evaluate_brier(
        FromDraws(ngrams),
        batches_of(blocks, num_blocks, label=_label(ngrams)),
        eos_token_id=ngrams.eos_token_id,
        pad_token_id=ngrams.pad_token_id,
        seed=seed,
    )


def score_ngrams_perplexity(
    ngrams: NGramSampler, blocks: datasets.Dataset, num_blocks: int | None = None
) -> PerplexityResult:
    """Perplexity of an n-gram model, on the same blocks as the model's."""
    return evaluate_ngram_perplexity(ngrams, batches_of(blocks, num_blocks, label=_label(ngrams)))


def _label(ngrams: NGramSampler) -> str:
    return f"scoring the {ngrams.order}-gram floor"
