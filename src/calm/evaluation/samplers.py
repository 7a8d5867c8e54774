"""How each kind of model is scored.

Shapes: B batch, C chunks, P targets, K tokens per chunk, N draws.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.core.brier import NUM_ORDERS
from calm.core.chunks import split_into_chunks
from calm.core.temperature import TemperatureSettings
from calm.errors import InputError
from calm.evaluation.brier import ChunkSampler, ChunkScorer
from calm.evaluation.processes import Block
from calm.evaluation.readers import CalmDraws, Chunks, Tokens
from calm.evaluation.steps import ProbabilityScorer, StepScorer
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM

Estimator = Literal["best", "draws"]
_ALIBI = ("bloom", "mpt")  # Positions are counted from the mask.


class CalmSampler:
    """A CALM as a sampler of chunks."""

    def __init__(self, draws: CalmDraws) -> None:
        self.draws = draws
        self.chunk_size = draws.model.config.chunk_size

    def draw_next_chunks(
        self, block: Block, is_target_BC: Tensor, num_draws: int, generator: torch.Generator
    ) -> Tensor:
        """See `calm.evaluation.brier.ChunkSampler`."""
        hidden_BCD = self.draws.model.hidden_states_of_chunks(
            block["input_ids"], position_ids=block["position_ids"]
        )
        return self.draws(hidden_BCD[:, :-1][is_target_BC], num_draws, generator)


class AutoencoderCeiling:
    """The best that a language model on this autoencoder can do: the true next latents, decoded.

    Draws come from the posterior of the true chunk, the target of training; what it scores below 100 is
    what the autoencoder loses.

    Args:
        autoencoder: The autoencoder.
        chunk_size: Tokens of a target, a multiple of the autoencoder's chunk size.
    """

    def __init__(self, autoencoder: CalmAutoencoder, chunk_size: int) -> None:
        self.autoencoder, self.chunk_size = autoencoder, chunk_size

    def draw_next_chunks(
        self, block: Block, is_target_BC: Tensor, num_draws: int, generator: torch.Generator
    ) -> Tensor:
        """See `calm.evaluation.brier.ChunkSampler`."""
        chunks_PK = split_into_chunks(block["input_ids"], self.chunk_size)[:, 1:][is_target_BC]
        posterior = self.autoencoder.encode(
            split_into_chunks(chunks_PK, self.autoencoder.config.chunk_size).flatten(0, 1)
        )
        draws_NPK = self.autoencoder.decode_tokens(posterior.sample(num_draws, generator))
        return draws_NPK.reshape(num_draws, *chunks_PK.shape)


def scorer_of(
    model: PreTrainedModel, estimator: Estimator = "best", settings: TemperatureSettings | None = None
) -> ChunkSampler | ChunkScorer:
    """The scorer that fits a model.

    Args:
        model: A CALM, or any causal language model of transformers.
        estimator: "best" takes the probabilities of a model that has them; "draws" takes draws of it as
            of a CALM, which is noisier and has the same mean.
        settings: Temperature, and how a CALM samples at it; T = 1 when None.

    Raises:
        InputError: If the model cannot be scored.
    """
    if isinstance(model, CalmForCausalLM):
        return scorer_of_draws(CalmDraws(model, settings), estimator)
    if not model.can_generate():
        raise InputError(f"a {type(model).__name__} is no causal language model; there is nothing to score.")
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads") or model._is_stateful or config.model_type in _ALIBI:
        raise InputError(
            f"'{config.model_type}' models cannot be scored: a text is read once and left at every place, "
            "which takes attention alone, with positions that are given to it."
        )
    if settings is not None and settings.temperature == 0:
        raise InputError("accuracy and collision are measured at temperatures above 0.")
    tokens = Tokens(model, settings.temperature if settings else 1.0)
    return ProbabilityScorer(tokens) if estimator == "best" else StepScorer(tokens)


def scorer_of_draws(draws: CalmDraws, estimator: Estimator = "best") -> ChunkSampler | ChunkScorer:
    """The scorer of a CALM; `draws.mean_draws` tells afterwards what its samples took."""
    if estimator == "best" and draws.have_probabilities:
        return ProbabilityScorer(Chunks(draws))
    is_long = draws.model.config.chunk_size >= NUM_ORDERS
    return CalmSampler(draws) if is_long else StepScorer(Chunks(draws))


def scorer_at(
    model: PreTrainedModel, temperature: float
) -> tuple[ChunkSampler | ChunkScorer, CalmDraws | None]:
    """The scorer of a model at a temperature, and the draws of a CALM, by its default sampler.

    Args:
        model: A CALM, or any causal language model of transformers.
        temperature: Above 0.
    """
    settings = TemperatureSettings(temperature=temperature)
    if not isinstance(model, CalmForCausalLM):
        return scorer_of(model, settings=settings), None
    draws = CalmDraws(model, dataclasses.replace(settings, sampler=model.default_sampler(temperature)))
    return scorer_of_draws(draws), draws
