"""Cache, rows at once, and bounds."""

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
def test_the_cache_is_that_of_a_text_that_is_read(recipe):
    stage = stages(recipe)[-1]
    network = build_network(stage).to(torch.bfloat16).eval()
    cache = DynamicCache(config=getattr(stage.config, "backbone", stage.config))
    network(torch.zeros(1, 32, dtype=torch.long), **{CACHE: cache}, use_cache=True)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    planned = serving_of(stage.config, L4)
    assert planned.cache_per_token * 32 == kept
    assert planned.weights == sum(p.nbytes for p in network.parameters())


def test_shared_heads_of_keys_take_less():
    one, shared = (
        serving_of(stages(language_model__num_key_value_heads=heads)[-1].config, L4) for heads in (4, 1)
    )
    assert one.cache_per_token == 4 * shared.cache_per_token


def test_rows_fit_and_one_more_does_not():
    planned = serving_of(stages()[-1].config, L4)
    rows = planned.rates[-1].rows
    row = planned.context * planned.cache_per_token
    assert planned.weights + rows * row <= L4.usable < planned.weights + (rows + 1) * row
    assert planned.context == 512 * 4


def test_bounds():
    """Many draws are bound by computing, one row of one draw by reading the weights."""
    wide = {"autoencoder__hidden_size": 256, "data__vocab_size": 4096}
    config = stages(language_model__num_key_value_heads=1, **wide)[-1].config
    planned = serving_of(config, L4)
    one, many = planned.rates
    assert one.rows == 1 and planned.draws == 200
    embedding = config.vocab_size * config.hidden_size * 2
    read = planned.weights - embedding + planned.context * planned.cache_per_token
    assert one.memory_seconds == pytest.approx(read / L4.bandwidth)
    flops = 4 * sum(cost_of(config, Work(512, 200)).inference.values())
    assert many.compute_seconds == pytest.approx(many.rows * flops / L4.half_flops)
    assert many.bound == "compute" and many.tokens_per_second == 4 * many.rows / many.compute_seconds
    tokens = serving_of(stages("demo_baseline")[-1].config, L4)
    assert tokens.draws == 1 and tokens.rates[0].bound == "bandwidth"


def test_a_model_that_does_not_fit_has_no_rows():
    planned = serving_of(stages()[-1].config, dataclasses.replace(L4, memory=1e5))
    assert planned.rates == []
