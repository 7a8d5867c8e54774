"""Layers over the tokens of a chunk: windows against the layers of the source, and step by step."""

import torch
from tiny import tiny_llama
from torch.testing import assert_close

from calm.flops import _decoder_weights
from calm.models.caches import CACHE
from calm.models.token_layers import TokenLayers, layer_sizes, multiply_adds_of_layer

WINDOWS, SIZE = 5, 4


def layers_and_input():
    source = tiny_llama(num_key_value_heads=1)
    layers = TokenLayers(source.config, 2).double()
    generator = torch.Generator().manual_seed(1)
    cache = source(torch.tensor([[1]]), use_cache=True)[CACHE].layers
    for layer, source_layer, cached in zip(layers.layers, source.model.layers, cache, strict=True):
        sink = {"sink_key": cached.keys[0], "sink_value": cached.values[0]}
        layer.load_state_dict(source_layer.state_dict() | sink)
    return source, layers, torch.randn(WINDOWS, SIZE, 16, dtype=torch.float64, generator=generator)


def test_window_equals_a_text_that_starts_with_the_sink():
    source, layers, x_MWD = layers_and_input()
    sink = source.model.embed_tokens(torch.ones(WINDOWS, 1, dtype=torch.long))
    states = torch.cat([sink, x_MWD], dim=1)
    position = torch.arange(SIZE + 1)
    rotation = source.model.rotary_emb(states, position[None])
    for layer in source.model.layers:
        states = layer(states, position_embeddings=rotation)
    assert_close(layers(x_MWD), states[:, 1:], rtol=0, atol=1e-12)


def test_steps_equal_the_whole_window():
    _, layers, x_MWD = layers_and_input()
    memory, steps = [], []
    for index in range(SIZE):
        if index == 1:
            packed = layers.pack(memory)
            assert packed.shape == (WINDOWS, layers.memory_size)
            memory = layers.unpack(packed)
        state, memory = layers.step(x_MWD[:, index], index, memory)
        steps.append(state)
    assert_close(torch.stack(steps, dim=1), layers(x_MWD), rtol=0, atol=1e-12)


def test_no_layers_are_the_identity():
    source, _, x_MWD = layers_and_input()
    layers = TokenLayers(source.config, 0)
    assert layers(x_MWD) is x_MWD and layers.step(x_MWD[:, 0], 0, [])[1] == [] and layers.memory_size == 0


def test_sizes_and_flops_match_the_source():
    source, layers, _ = layers_and_input()
    assert layer_sizes(layers.config) == layer_sizes(source.config)
    matrices = sum(weight.numel() for weight in source.model.layers.parameters() if weight.ndim == 2)
    assert 2 * multiply_adds_of_layer(source.config, SIZE) == matrices + 2 * 2 * SIZE * 16
    assert _decoder_weights(source.config) == matrices
