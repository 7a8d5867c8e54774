"""FLOPs and parameters, against the published table and against torch's FlopCounterMode."""

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import DynamicCache

from calm.errors import InputError
from calm.flops import (
    Cost,
    Work,
    autoencoder_training_flops,
    cost_of,
    cost_of_thoughts,
    thinking_flops,
)
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.thoughts import Thinking, Thoughts, read_positions
from calm.models.tokens import LlamaForCausalLM as ThinkingLlama

VOCAB = 128_257  # Llama 3 and padding.
TOKENS = 5e11
SIZES = {"S": (12, 768, 2048), "M": (16, 1024, 2752), "L": (16, 1536, 4096), "XL": (16, 2560, 6880)}


def transformer(size):
    layers, width, inner = SIZES[size]
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=16, tie_word_embeddings=False,
    )  # fmt: skip


def calm(size):
    layers, width, inner = SIZES[size]
    return CalmConfig(
        autoencoder_config=CalmAutoencoderConfig(
            vocab_size=VOCAB, chunk_size=4, latent_size=128, hidden_size=512, intermediate_size=1280
        ),
        backbone_config={
            "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": 16, "num_key_value_heads": 16,
        },
        head_config={"head_type": "energy", "num_blocks": layers // 4, "num_draws": 8},
    )  # fmt: skip


def total(parts):
    return sum(parts.values())


# The paper's table: parameters in millions (of a CALM without its autoencoder of 75.8M), training FLOPs in
# 1e20, inference FLOPs per token in 1e8; then the largest deviation of our counts from each, in percent. No
# single rule gives all of the CALM rows: our training FLOPs of L and XL and inference FLOPs of XL are above.
TABLE = [
    (transformer("S"), 281, 6.6, 4.4, (2, 2, 2)),
    (transformer("M"), 465, 11.9, 7.9, (2, 2, 2)),
    (transformer("L"), 849, 22.5, 15.0, (2, 2, 2)),
    (calm("M"), 371, 3.7, 2.9, (2, 2.1, 2)),
    (calm("L"), 735, 7.7, 4.6, (2, 5, 2)),
    (calm("XL"), 1820, 19.5, 9.4, (2, 11, 3.5)),
]


@pytest.mark.parametrize(("config", "parameters", "training", "inference", "percent"), TABLE)
def test_costs_are_close_to_the_published_table(config, parameters, training, inference, percent):
    cost = cost_of(config, Work(condition_per_draw=True))
    autoencoder = cost.parameters.get("autoencoder", 0)
    ratios = (
        (total(cost.parameters) - autoencoder) / 1e6 / parameters,
        total(cost.training) * TOKENS / 1e20 / training,
        total(cost.inference) / 1e8 / inference,
    )
    for ratio, tolerance in zip(ratios, percent, strict=True):
        assert abs(ratio - 1) < tolerance / 100


def test_inference_flops_follow_the_rules_of_the_paper():
    """By them, one draw of CALM-M takes 2.905e8 FLOPs per token."""
    assert total(cost_of(calm("M")).inference) == pytest.approx(2.905e8, rel=1e-3)
    assert total(cost_of(transformer("S")).inference) == pytest.approx(4.42e8, rel=2e-3)


def test_200_draws_take_100_times_the_flops_of_one():
    """Most of them for the vocabulary projection."""
    cost = cost_of(calm("M"), Work(draws=200, condition_per_draw=True))
    assert total(cost.inference) == pytest.approx(3.0e10, rel=0.02)
    assert cost.inference["vocabulary"] / total(cost.inference) == pytest.approx(0.87, abs=0.01)


def flops_of(function):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def assert_flops(actual, expected, rotary):
    """Equal, but some releases of transformers also multiply to compute rotary angles."""
    assert min(abs(actual - expected), abs(actual - expected - rotary)) <= 1


@pytest.mark.parametrize(
    ("kind", "size"), [(LlamaConfig, 6), (MistralConfig, 6), (Qwen3Config, 6), (Qwen2Config, None)]
)
def test_llama_agrees_with_an_independent_counter(kind, size):
    config = kind(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, attn_implementation="eager",
        **({} if size is None else {"head_dim": size}),
    )  # fmt: skip
    model, tokens = AutoModelForCausalLM.from_config(config), torch.randint(90, (1, 20))
    expected = total(cost_of(config, Work(positions=20)).inference) * 20
    assert_flops(flops_of(lambda: model(tokens)), expected, rotary=(size or 8) * 20)
    assert total(cost_of(config).parameters) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("draws", [1, 7])
def test_calm_agrees_with_an_independent_counter(chunk_size, draws):
    model = tiny_model(chunk_size, backbone_config={"attn_implementation": "eager"})
    chunks, config = 10, model.config
    model.backbone.set_attn_implementation("eager")
    tokens = torch.randint(40, (1, chunks * chunk_size))
    cost = cost_of(config, Work(positions=chunks, draws=draws))
    hidden = model.hidden_states_of_chunks(tokens)[0]

    def write():
        model.hidden_states_of_chunks(tokens)
        model.autoencoder.decode(model.head.sample_latents(hidden, draws))

    expected = total(cost.inference) * chunks * chunk_size
    assert_flops(flops_of(write), expected, rotary=8 * chunks)
    chunk = tokens.view(chunks, chunk_size)
    assert flops_of(lambda: model.autoencoder.encode(chunk)) == pytest.approx(
        cost.training["encoder"] * chunks * chunk_size, abs=1
    )
    assert total(cost.parameters) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("backbone_input", ["tokens", "latents", "both"])
def test_training_agrees_with_an_independent_counter(backbone_input):
    """Within 5%: the first layers need no gradient of their inputs, and the last chunk predicts nothing."""
    model = CalmForCausalLM(tiny_config(4, backbone_input=backbone_input))
    model.backbone.set_attn_implementation("eager")
    chunks = 40
    tokens = torch.randint(40, (1, chunks * 4))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    expected = total(cost_of(model.config, Work(positions=chunks)).training) * chunks * 4
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


def test_training_of_the_autoencoder_agrees_with_an_independent_counter():
    autoencoder = tiny_model(4).autoencoder.requires_grad_(True).train()
    tokens = torch.randint(40, (1, 160))
    with FlopCounterMode(display=False) as counter:
        autoencoder(tokens, labels=tokens).loss.backward()
    expected = autoencoder_training_flops(autoencoder.config) * 160
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def small_llama():
    config = LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation="eager",
    )  # fmt: skip
    return ThinkingLlama(config)


def small_calm(backbone_input):
    model = CalmForCausalLM(tiny_config(4, backbone_input=backbone_input))
    model.backbone.set_attn_implementation("eager")
    return model


MODELS = {
    "llama": small_llama,
    **{kind: lambda kind=kind: small_calm(kind) for kind in ("tokens", "latents", "both")},
}


@pytest.mark.parametrize("kind", MODELS)
def test_thoughts_agree_with_an_independent_counter(kind):
    """A thought, and a marker before or after thoughts, each as the tenth position."""
    model, before = MODELS[kind](), 9
    backbone, size = (
        (model.model, 1) if isinstance(model, ThinkingLlama) else (model.backbone, model.config.chunk_size)
    )
    state = torch.randn(1, 32)

    def cache():
        filled = DynamicCache(config=backbone.config)
        with torch.no_grad():
            read_positions(backbone, torch.randn(1, before, 32), cache=filled)
        return filled

    def think(filled):
        thinking = Thinking(torch.tensor([[True]]), None, state)
        read_positions(backbone, torch.zeros(1, 1, 32), cache=filled, thinking=thinking)

    def read(filled):
        if size == 1:
            backbone(torch.tensor([[5]]), use_cache=True, past_key_values=filled)
        else:
            model(torch.full((1, size), 5), cache=filled, use_cache=True)

    thoughts = cost_of_thoughts(model.config, 6, before + 1)
    filled = cache()
    thought = flops_of(lambda: think(filled))
    assert_flops(thought, thoughts.flops_of_one, rotary=8)
    filled = cache()
    marker = flops_of(lambda: read(filled))
    assert marker == thought if size == 1 else marker > thought
    rotary = thought - thoughts.flops_of_one
    assert thoughts.number == 6
    assert thoughts.flops == pytest.approx(6 * thought + 2 * marker - 8 * rotary)
    model.config.thoughts = Thoughts(3, 1, 2, "pause").as_dict()
    assert cost_of_thoughts(model.config, 1, before + 1).flops_of_one == pytest.approx(marker - rotary)


def test_a_thought_takes_only_the_backbone():
    """A chunk also takes the head, the decoder and the vocabulary projection."""
    config = calm("M")
    cost, thoughts = cost_of(config), cost_of_thoughts(config, 1)
    layers = 4 * (cost.inference["backbone"] + cost.inference["attention"])
    assert thoughts.flops_of_one == layers < 4 * total(cost.inference) / 2
    assert thoughts.flops == 3 * layers + 2 * 4 * cost.inference["input"]
    none = cost_of_thoughts(config, 0)
    assert none.flops == thoughts.flops - layers


@pytest.mark.parametrize(("thoughts", "supervised"), [(None, 0), (0, 0), (8, 0), (8, 8)])
@pytest.mark.parametrize("kind", MODELS)
def test_training_to_think_agrees_with_an_independent_counter(kind, thoughts, supervised):
    """Within 8%: the network attends to fewer keys, embeds thoughts in vain, and skips some gradients."""
    model = MODELS[kind]().train()
    size = getattr(model.config, "chunk_size", 1)
    prompt, written, between = 12, 8, 0 if thoughts is None else thoughts + 2
    number = prompt + between + written
    ids = torch.randint(3, 40, (1, number * size))
    labels = ids.masked_fill(torch.arange(number * size) < (prompt + between) * size, -100)
    is_thought = torch.zeros(1, number, dtype=torch.bool)
    is_thought[:, prompt + 1 : prompt + 1 + (thoughts or 0)] = True
    labels[:, (prompt + 1) * size : (prompt + 1 + supervised) * size] = 39
    arguments = {"is_thought": is_thought} if thoughts else {}
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=labels, **arguments).loss.backward()
    expected = thinking_flops(model.config, prompt, thoughts, written, supervised)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.08)


def test_impossible_training_rows_are_refused():
    for row, message in (
        ((0, 1, 1), "prompt must be"),
        ((1, 1, 0), "written must"),
        ((1, -1, 1), "thoughts"),
        ((1, 2, 1, 3), "supervised must be at least 0 and at most 2, got 3"),
    ):
        with pytest.raises(InputError, match=message):
            thinking_flops(calm("M"), *row)
    with pytest.raises(InputError, match="number of thoughts must be at least 0 and at most 10,000, got -1"):
        cost_of_thoughts(calm("M"), -1)
    with pytest.raises(InputError, match="type llama, mistral, qwen2, qwen3, not 'mamba'"):
        cost_of_thoughts(MambaConfig(), 3)


def test_the_shared_condition_is_counted_once_by_default():
    shared, literal = (cost_of(calm("M"), Work(condition_per_draw=literal)) for literal in (False, True))
    assert total(shared.inference) == total(literal.inference)
    assert total(shared.training) < total(literal.training)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(InputError, match="type llama, mistral, qwen2, qwen3, not 'mamba'"):
        cost_of(MambaConfig())
    with pytest.raises(InputError, match="at least 1, got 2048 and 0"):
        Work(draws=0)
    assert Cost().inference == {}
