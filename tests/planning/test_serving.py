"""Serving: the cache, how many rows fit, and what bounds the rate."""

import dataclasses

import pytest
import torch
from planning_recipes import build_network, stages
from transformers import DynamicCache

from calm.flops import Work, cost_of
from calm.models.caches import CACHE
from calm.planning.devices import CARDS
from calm.planning.serving import serving_of

L4 = CARDS["L4"]


@pytest.mark.parametrize("recipe", ["demo", "demo_sequential", "demo_baseline"])
def test_cache_and_weights_are_those_of_a_real_network(recipe):
    stage = stages(recipe)[-1]
    network = build_network(stage).to(torch.bfloat16).eval()
    cache = DynamicCache(config=getattr(stage.config, "backbone", stage.config))
    network(torch.zeros(1, 32, dtype=torch.long), **{CACHE: cache}, use_cache=True)
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    planned = serving_of(stage.config, L4)
    assert planned.cache_per_token * 32 == cache_bytes
    assert planned.weights == sum(p.nbytes for p in network.parameters())


def test_cache_shrinks_with_the_number_of_key_value_heads():
    four, one = (
        serving_of(stages(language_model__num_key_value_heads=heads)[-1].config, L4) for heads in (4, 1)
    )
    assert four.cache_per_token == 4 * one.cache_per_token


def test_rows_fit_and_one_more_does_not():
    planned = serving_of(stages()[-1].config, L4)
    rows = planned.rates[-1].rows
    row_bytes = planned.context * planned.cache_per_token
    assert planned.weights + rows * row_bytes <= L4.usable < planned.weights + (rows + 1) * row_bytes
    assert planned.context == 512 * 4


def test_many_draws_are_compute_bound_and_single_rows_bandwidth_bound():
    """Many draws are bound by compute, one row of one draw by reading the weights."""
    wide = {"autoencoder__hidden_size": 256, "data__vocab_size": 4096}
    config = stages(language_model__num_key_value_heads=1, **wide)[-1].config
    planned = serving_of(config, L4)
    one_row, many_rows = planned.rates
    assert one_row.rows == 1 and planned.draws == 200
    embedding = config.vocab_size * config.hidden_size * 2
    bytes_read = planned.weights - embedding + planned.context * planned.cache_per_token
    assert one_row.memory_seconds == pytest.approx(bytes_read / L4.bandwidth)
    flops = 4 * sum(cost_of(config, Work(512, 200)).inference.values())
    assert many_rows.compute_seconds == pytest.approx(many_rows.rows * flops / L4.half_flops)
    assert many_rows.bound == "compute"
    assert many_rows.tokens_per_second == 4 * many_rows.rows / many_rows.compute_seconds
    baseline = serving_of(stages("demo_baseline")[-1].config, L4)
    assert baseline.draws == 1 and baseline.rates[0].bound == "bandwidth"


def test_a_model_that_does_not_fit_has_no_rows():
    planned = serving_of(stages()[-1].config, dataclasses.replace(L4, memory=1e5))
    assert planned.rates == []
