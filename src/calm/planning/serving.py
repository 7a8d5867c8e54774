"""What serving the model of a recipe can reach on one card: bounds, not forecasts."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from calm.flops import Work, cost_of
from calm.models.caches import CACHE
from calm.models.configuration import CalmConfig
from calm.planning.devices import Device
from calm.planning.memory import bytes_of, has_tied_scores

POOL = 200
"""Draws of a chunk at low temperature, for heads that take no temperature themselves."""


@dataclass(frozen=True)
class Rate:
    """The most that a number of rows can reach.

    Args:
        rows: Texts that are written at once, each with a full context.
        memory_seconds: Seconds of a step in which weights and cache are read once.
        compute_seconds: Seconds of its FLOPs at full speed.
        chunk_size: Tokens that a step writes for each row.
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
        """Tokens of all rows."""
        return self.rows * self.chunk_size / max(self.memory_seconds, self.compute_seconds)


@dataclass(frozen=True)
class Serving:
    """A model on one card, in bfloat16.

    Args:
        weights: Bytes of all weights.
        cache_per_token: Bytes of keys and values for each token of a text.
        context: Tokens of the longest text.
        draws: Draws of a chunk.
        rates: With one row, and with as many as fit; empty if the weights do not fit.
    """

    weights: int
    cache_per_token: float
    context: int
    draws: float
    rates: list[Rate]


def serving_of(config: PreTrainedConfig, device: Device) -> Serving:
    """What a model can reach on a card.

    Args:
        config: Its configuration.
        device: The card.

    Raises:
        InputError: If its FLOPs are not known.
    """
    size = getattr(config, "chunk_size", 1)
    is_calm = isinstance(config, CalmConfig)
    backbone: Any = config.backbone if is_calm else config
    context = backbone.max_position_embeddings * size
    draws = POOL if is_calm and config.head.lowest_temperature == 1 else 1
    weights, read, cache = _bytes_of_model(config, size)
    cost = sum(cost_of(config, Work(backbone.max_position_embeddings, draws)).inference.values())

    def rate(rows: int) -> Rate:
        moved = read + rows * context * cache
        flops = rows * size * cost
        return Rate(rows, moved / device.bandwidth, flops / device.half_flops, size)

    most = int((device.usable - weights) // (context * cache))
    rows = [] if most < 1 else sorted({1, most})
    return Serving(weights, cache, context, draws, [rate(number) for number in rows])


def _bytes_of_model(config: PreTrainedConfig, chunk_size: int) -> tuple[int, int, float]:
    """Bytes of weights, of those that are read in a step, and of the cache for each token.

    Of the embedding only a few rows are read, unless scores are computed with it.
    """
    with torch.no_grad(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        cache = DynamicCache(config=getattr(config, "backbone", config))
        model(torch.zeros(1, chunk_size, dtype=torch.long), **{CACHE: cache}, use_cache=True)
        layers: list[Any] = cache.layers
        kept = [leaf for layer in layers for leaf in (layer.keys, layer.values)]
        weights = bytes_of(model.parameters())
        looked_up = 0 if has_tied_scores(config) else model.get_input_embeddings().weight.nbytes
        return weights, weights - looked_up, bytes_of(kept) / chunk_size
