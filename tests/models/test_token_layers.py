"""Layers over the tokens of a chunk: a window against the source itself, and step by step."""

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
    for own, layer, first in zip(layers.layers, source.model.layers, cache, strict=True):
        own.load_state_dict(layer.state_dict() | {"sink_key": first.keys[0], "sink_value": first.values[0]})
    return source, layers, torch.randn(WINDOWS, SIZE, 16, dtype=torch.float64, generator=generator)


def test_windows_are_texts_that_begin_with_the_sink():
    source, layers, x_MWD = layers_and_input()
    first = source.model.embed_tokens(torch.ones(WINDOWS, 1, dtype=torch.long))
    wanted = torch.cat([first, x_MWD], dim=1)
    place = torch.arange(SIZE + 1)
    rotation = source.model.rotary_emb(wanted, place[None])
    for layer in source.model.layers:
        wanted = layer(wanted, position_embeddings=rotation)
    assert_close(layers(x_MWD), wanted[:, 1:], rtol=0, atol=1e-12)


def test_steps_are_the_whole():
    _, layers, x_MWD = layers_and_input()
    memory, steps = [], []
    for place in range(SIZE):
        if place == 1:
            packed = layers.pack(memory)
            assert packed.shape == (WINDOWS, layers.memory_size)
            memory = layers.unpack(packed)
        state, memory = layers.step(x_MWD[:, place], place, memory)
        steps.append(state)
    assert_close(torch.stack(steps, dim=1), layers(x_MWD), rtol=0, atol=1e-12)


def test_without_layers_nothing_happens():
    source, _, x_MWD = layers_and_input()
    layers = TokenLayers(source.config, 0)
    assert layers(x_MWD) is x_MWD and layers.step(x_MWD[:, 0], 0, [])[1] == [] and layers.memory_size == 0


def test_sizes_and_flops_are_those_of_the_layers():
    source, layers, _ = layers_and_input()
    assert layer_sizes(layers.config) == layer_sizes(source.config)
    matrices = sum(weight.numel() for weight in source.model.layers.parameters() if weight.ndim == 2)
    assert 2 * multiply_adds_of_layer(source.config, SIZE) == matrices + 2 * 2 * SIZE * 16
    assert _decoder_weights(source.config) == matrices
