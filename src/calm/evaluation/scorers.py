"""The scorer for each kind of model, and the ceiling of an autoencoder.

Shapes: B batch, C chunks, P targets, K tokens per chunk, N draws.
"""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.core.chunks import split_into_chunks
from calm.core.samplers import Sampler
from calm.errors import InputError
from calm.evaluation.processes import Batch
from calm.evaluation.steps import DrawScorer, ProbabilityScorer
from calm.models.autoencoder import CalmAutoencoder
from calm.models.language_model import language_model
from calm.models.readers import LikelihoodReader

Estimator = Literal["best", "draws"]


class AutoencoderCeiling:
    """The best a language model on this autoencoder can do: the true next latents, decoded.

    Draws come from the posterior of the true chunk, which is the training target; the gap between its score
    and 100 is what the autoencoder loses.

    Args:
        autoencoder: The autoencoder.
        chunk_size: Tokens of a target, a multiple of the autoencoder's chunk size.
    """

    def __init__(self, autoencoder: CalmAutoencoder, chunk_size: int) -> None:
        self.autoencoder, self.chunk_size = autoencoder, chunk_size

    def draw_next_chunks(
        self, batch: Batch, is_target_BC: Tensor, num_draws: int, generator: torch.Generator
    ) -> Tensor:
        """See `calm.evaluation.brier.ChunkSampler`."""
        chunks_PK = split_into_chunks(batch["input_ids"], self.chunk_size)[:, 1:][is_target_BC]
        posterior = self.autoencoder.encode(
            split_into_chunks(chunks_PK, self.autoencoder.config.chunk_size).flatten(0, 1)
        )
        draws_NPK = self.autoencoder.decode_tokens(posterior.sample(num_draws, generator))
        return draws_NPK.reshape(num_draws, *chunks_PK.shape)


def scorer_of(
    model: PreTrainedModel,
    estimator: Estimator = "best",
    *,
    temperature: float = 1.0,
    sampler: Sampler | None = None,
) -> DrawScorer | ProbabilityScorer:
    """The scorer for a model; afterwards, `scorer.reader.mean_draws` is the mean number of draws per sample.

    Args:
        model: A CALM, or any causal language model of transformers.
        estimator: "best" uses the probabilities of a model that has them; "draws" uses draws, as for
            a CALM, which is noisier and has the same mean.
        temperature: Temperature of the draws, with the model's default sampler.
        sampler: A sampler for a CALM to use instead.

    Raises:
        InputError: If the model cannot be scored.
    """
    try:
        reader = language_model(model).reader(temperature, sampler)
    except ValueError as error:
        raise InputError(str(error)) from error
    if estimator == "best" and isinstance(reader, LikelihoodReader):
        return ProbabilityScorer(reader)
    return DrawScorer(reader)
