"""`SlotCache` and the lean step on it: rows of any length, room that grows, rows that leave."""

import pytest
import torch
from tiny import tiny_model
from transformers.cache_utils import DynamicCache

from calm.models.generation.lean import ChunkStep, can_step
from calm.models.generation.prompts import Prompt, positions_of, read_chunks
from calm.models.generation.slots import SlotCache

LENGTHS = (24, 9, 17)


def read_prompts(model, lengths=LENGTHS):
    """Left-padded prompts of these lengths, and transformers' cache after reading them."""
    width = max(lengths)
    ids_BT = torch.randint(3, 40, (len(lengths), width))
    mask_BT = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    prompt, cache = Prompt.aligned(model, ids_BT, mask_BT), DynamicCache(config=model.config.backbone)
    prompt.read(model, cache)
    return prompt, cache


# Grouped keys, a key for each query, biases, and every rotary embedding that the lean step supports.
BACKBONES = [
    {},
    {"num_key_value_heads": 4},
    {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 256,
    },
]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("backbone_input", ["tokens", "latents", "both"])
@torch.no_grad()
def test_lean_step_matches_the_forward_pass(backbone, backbone_input):
    settings = {"max_position_embeddings": 256} | backbone
    model = tiny_model(backbone_config=settings, backbone_input=backbone_input)
    prompt, cache = read_prompts(model)
    slots, step, mask_BC = SlotCache.of(cache, prompt.mask_BC), ChunkStep(model), prompt.mask_BC
    assert slots.lengths == [6, 3, 5]
    for index in range(80):  # More than the initial room.
        chunks_BK = torch.randint(3, 40, (3, 4))
        mask_BC = torch.cat([mask_BC, mask_BC.new_ones(3, 1)], dim=1)
        expected = read_chunks(model, chunks_BK, mask_BC, positions_of(mask_BC)[:, -1:], cache)[:, -1]
        lean = step(chunks_BK, torch.tensor(slots.lengths), slots.window())
        slots.grow()
        torch.testing.assert_close(lean, expected, rtol=1e-4, atol=1e-4, msg=f"step {index}")


@torch.no_grad()
def test_removing_a_row_does_not_change_the_others():
    model = tiny_model()
    prompt, cache = read_prompts(model)
    step, full = ChunkStep(model), SlotCache.of(cache, prompt.mask_BC)
    selected = SlotCache.of(cache, prompt.mask_BC).select([0, 2])
    for _ in range(3):
        chunks_BK = torch.randint(3, 40, (3, 4))
        expected = step(chunks_BK, torch.tensor(full.lengths), full.window())[[0, 2]]
        actual = step(chunks_BK[[0, 2]], torch.tensor(selected.lengths), selected.window())
        torch.testing.assert_close(actual, expected)
        full.grow()
        selected.grow()
    assert len(selected) == 2 and selected.lengths == [9, 8]


def test_window_is_contiguous_with_room_for_a_chunk_and_not_much_more():
    model = tiny_model()
    prompt, cache = read_prompts(model)
    slots = SlotCache.of(cache, prompt.mask_BC)
    for lengths, room in (
        ((6, 3, 5), 16),
        ((15, 3, 5), 16),
        ((16, 3, 5), 32),
        ((800, 3, 5), 816),
        ((816, 3, 5), 928),
    ):
        slots.lengths = list(lengths)
        assert {(states.shape[2], states.is_contiguous()) for states in slots.window()} == {(room, True)}
    assert slots.select([1, 1]).window()[0].shape[:3] == (2, 2, 16)


@torch.no_grad()
def test_row_in_the_slot_of_a_longer_one_keeps_none_of_its_states():
    model = tiny_model()
    prompt, cache = read_prompts(model)
    slots = SlotCache.of(cache, prompt.mask_BC)
    for states in slots.window():
        states[0] = float("inf")
    slots.put(0, slots.select([1]))
    assert slots.lengths == [3, 3, 5] and slots.has_room(0)
    for states in slots.window():
        assert torch.equal(states[0], states[1])
    slots.lengths[0] = 16
    assert not slots.has_room(0)


def test_no_lean_step_for_layers_with_hooks_or_dynamic_rotation():
    assert can_step(tiny_model())
    hooked = tiny_model()
    hooked.backbone.layers[1].register_forward_hook(lambda *_: None)
    assert not can_step(hooked)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not can_step(tiny_model(backbone_config={"rope_parameters": dynamic}))


@pytest.mark.parametrize("head_type", ["energy", "sequential"])
@pytest.mark.parametrize("is_autocast", [True, False])
def test_half_precision_writes_the_same_as_the_forward_pass(is_autocast, head_type):
    model = tiny_model(head_config={"head_type": head_type})
    if not is_autocast:
        model = model.to(torch.bfloat16)
    prompt, settings = torch.randint(3, 40, (2, 6)), {"max_new_tokens": 8, "temperature": 1.0, "seed": 0}
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        lean = model.generate(prompt, eos_token_id=[], **settings)
        expected = model.generate(prompt, eos_token_id=[], cache_implementation="dynamic", **settings)
    assert lean.shape == (2, 14)
    assert (lean[:, :10] == expected[:, :10]).all()  # The first chunk; later ones may round differently.


def test_a_hook_on_a_layer_is_called_for_every_chunk():
    model, calls = tiny_model(), []
    model.backbone.layers[1].register_forward_hook(lambda *_: calls.append(1))
    model.generate(torch.randint(3, 40, (1, 4)), max_new_tokens=12, eos_token_id=[], temperature=1.0)
    assert len(calls) == 3
