"""How fast one card could serve the model of a recipe: upper bounds, not forecasts."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from calm.flops import Work, cost_of
from calm.models.caches import CACHE
from calm.models.configuration import CalmConfig
from calm.models.hyperparameters import chunk_size_of
from calm.planning.devices import Device
from calm.planning.memory import bytes_of, has_tied_scores

POOL = 200
"""Draws per chunk at low temperature, for heads that have no temperature of their own."""


@dataclass(frozen=True)
class Rate:
    """The upper bound for a batch size.

    Args:
        rows: Texts generated at once, each with a full context.
        memory_seconds: Seconds per step to read weights and KV cache once.
        compute_seconds: Seconds per step for its FLOPs at peak speed.
        chunk_size: Tokens that a step generates per row.
    """

    rows: int
    memory_seconds: float
    compute_seconds: float
    chunk_size: int

    @property
    def bound(self) -> str:
        """What takes longer: "bandwidth" or "compute"."""
        return "bandwidth" if self.memory_seconds >= self.compute_seconds else "compute"

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all rows together."""
        return self.rows * self.chunk_size / max(self.memory_seconds, self.compute_seconds)


@dataclass(frozen=True)
class Serving:
    """A model on one card, in bfloat16.

    Args:
        weights: Bytes of all weights.
        cache_per_token: Bytes of keys and values per token of a text.
        context: Tokens of the longest text.
        draws: Draws per chunk.
        rates: With one row, and with as many as fit; empty if not even one row fits.
    """

    weights: int
    cache_per_token: float
    context: int
    draws: float
    rates: list[Rate]


def serving_of(config: PreTrainedConfig, device: Device) -> Serving:
    """How fast a card could serve a model.

    Args:
        config: Its configuration.
        device: The card.

    Raises:
        InputError: If its FLOPs are not known.
    """
    size = chunk_size_of(config)
    is_calm = isinstance(config, CalmConfig)
    backbone: Any = config.backbone if is_calm else config
    context = backbone.max_position_embeddings * size
    draws = POOL if is_calm and config.head.lowest_temperature == 1 else 1
    weights, weights_read, cache = _bytes_of_model(config, size)
    cost = sum(cost_of(config, Work(backbone.max_position_embeddings, draws)).inference.values())

    def rate(rows: int) -> Rate:
        bytes_read = weights_read + rows * context * cache
        flops = rows * size * cost
        return Rate(rows, bytes_read / device.bandwidth, flops / device.half_flops, size)

    max_rows = int((device.usable - weights) // (context * cache))
    batch_sizes = [] if max_rows < 1 else sorted({1, max_rows})
    return Serving(weights, cache, context, draws, list(map(rate, batch_sizes)))


def _bytes_of_model(config: PreTrainedConfig, chunk_size: int) -> tuple[int, int, float]:
    """Bytes of all weights, of the weights read in a step, and of the KV cache per token.

    Only a few rows of the embedding are read, unless it is tied to the output layer.
    """
    with torch.no_grad(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        cache = DynamicCache(config=getattr(config, "backbone", config))
        model(torch.zeros(1, chunk_size, dtype=torch.long), **{CACHE: cache}, use_cache=True)
        layers: list[Any] = cache.layers
        keys_and_values = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        weights = bytes_of(model.parameters())
        embedding = 0 if has_tied_scores(config) else model.get_input_embeddings().weight.nbytes
        return weights, weights - embedding, bytes_of(keys_and_values) / chunk_size
