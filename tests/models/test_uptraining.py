"""Converting a Transformer to a CALM, against the Transformer itself and its layers run by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from calm import CalmForCausalLM
from calm.errors import InputError
from calm.flops import cost_of
from calm.models.blocks import ZeroLinear
from calm.models.configuration import CalmConfig
from calm.models.generation.lean import can_step
from calm.models.loading import config_of, load_config
from calm.models.uptraining import Cut, calm_from_transformer, check_source, new_parameters

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
SOURCES: dict[str, PreTrainedConfig] = {
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=6),
    "llama, scaled positions": LlamaConfig(**SIZES, rope_parameters=ROPE, attention_bias=True),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA_3, mlp_bias=True, hidden_act="gelu"),
    "llama, yarn": LlamaConfig(**SIZES, rope_parameters=YARN, rms_norm_eps=1e-2),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, a window as long as the context": MistralConfig(**SIZES, sliding_window=64),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True),
    "qwen3, untied": Qwen3Config(**SIZES, head_dim=4, attention_bias=True),
}
IDS = torch.randint(3, 40, (2, 24), generator=torch.Generator().manual_seed(5))


class Tokenizer:
    """What a conversion needs from a tokenizer."""

    def __init__(self, size: int = 40, pad: int | None = 0, bos: int | None = 1) -> None:
        self.size, self.pad_token_id, self.bos_token_id, self.eos_token_id = size, pad, bos, 2

    def __len__(self) -> int:
        return self.size


def source_of(name: str):
    """A random source in double precision, to which every weight matters."""
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(SOURCES[name]).double().eval()
    with torch.no_grad():
        for weight in source.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1 if weight.ndim == 1 else 0))
    return source


def logits_of(model: CalmForCausalLM, tokens):
    """Logits of all tokens of the chunks after the first, (B·(C - 1)·K, V)."""
    states = model.hidden_states_of_chunks(tokens)[:, :-1].flatten(0, 1)
    chunks = tokens.unflatten(-1, (-1, model.config.chunk_size))[:, 1:].flatten(0, 1)
    return model.head._vectors(states, chunks) @ model.head._vocabulary().table_VX.T


@pytest.mark.parametrize("name", SOURCES)
def test_with_chunks_of_one_token_the_calm_is_the_source(name):
    source = source_of(name)
    model = calm_from_transformer(source, Tokenizer(), 1, Cut(0, 0))
    with torch.no_grad():
        logits, expected = logits_of(model, IDS), source(IDS).logits[:, :-1].flatten(0, 1)
        assert_close(logits, expected, rtol=0, atol=1e-10)
        loss = model(IDS, labels=IDS).loss
    assert_close(loss, F.cross_entropy(expected, IDS[:, 1:].flatten()).float())


def test_calm_in_half_precision_is_the_source():
    """Rotary frequencies must not be rounded: far from the beginning of a text, errors would be large."""
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(SOURCES["llama 3"], dtype=torch.bfloat16).eval()
    model = calm_from_transformer(source, Tokenizer(), 1, Cut(0, 0))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    tokens = torch.randint(3, 40, (1, 64))
    with torch.no_grad():
        assert torch.equal(logits_of(model, tokens), source(tokens).logits[:, :-1].flatten(0, 1))


def logits_by_hand(source, tokens, size: int, first: int, last: int, sink: bool = True):
    """Logits of the converted model, (C - 1, K, V), from the layers of the source, chunk by chunk."""
    network, layers = source.model, list(source.model.layers)

    def run(some_layers, x_TD):
        position = torch.arange(len(x_TD))[None]
        rotation, x = network.rotary_emb(x_TD[None], position), x_TD[None]
        for layer in some_layers:
            x = layer(x, position_embeddings=rotation)
        return x[0]

    embedded = network.embed_tokens(tokens)
    states = run(layers[: len(layers) - last], embedded[size - 1 :: size])
    bos = network.embed_tokens(torch.tensor([1])[:sink])  # Empty without a sink.
    bos_state = run(layers[: len(layers) - last], bos) if sink else bos
    logits = []
    for chunk in range(1, len(tokens) // size):
        window = embedded[chunk * size - 1 : chunk * size + size - 1]
        first_states = run(layers[:first], torch.cat([bos, window]))[len(bos) :]
        state = states[chunk - 1]
        inputs = torch.cat([state[None], first_states[1:] + (state - first_states[0])])
        last_states = run(layers[len(layers) - last :], torch.cat([bos_state, inputs]))[len(bos) :]
        logits.append(source.lm_head(network.norm(last_states)))
    return torch.stack(logits)


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(("size", "first", "last"), [(2, 1, 2), (4, 2, 3), (4, 0, 1), (3, 1, 0)])
@pytest.mark.parametrize("name", ["llama, tied", "llama 3", "qwen2", "qwen3"])
def test_untrained_calm_equals_the_layers_of_the_source_run_by_hand(name, size, first, last, sink):
    source = source_of(name)
    model = calm_from_transformer(source, Tokenizer(), size, Cut(first, last), sink=sink)
    assert any("sink" in key for key in model.state_dict()) == sink
    with torch.no_grad():
        expected = logits_by_hand(source, IDS[0], size, first, last, sink)
        assert_close(logits_of(model, IDS[:1]).view_as(expected), expected, rtol=0, atol=1e-9)


def test_reused_weights_are_those_of_the_source_and_new_ones_zero():
    source = source_of("qwen2")
    model = calm_from_transformer(source, Tokenizer(), 4, Cut(1, 2, [0, 2, 3, 5]))
    parts = (
        (model.head.first.layers, [0]),
        (model.backbone.layers, [0, 2]),
        (model.head.last.layers, [3, 5]),
    )
    for layers, numbers in parts:
        for layer, number in zip(layers, numbers, strict=True):
            weights = layer.state_dict()
            for key, weight in source.model.layers[number].state_dict().items():
                assert torch.equal(weights.pop(key), weight)
            remaining = {key for key in weights if not key.startswith("sink_")}
            assert remaining == {"self_attn.o_proj.bias"} and not weights["self_attn.o_proj.bias"].any()
    assert torch.equal(model.backbone.embed_tokens.weight, source.model.embed_tokens.weight)
    assert torch.equal(model.head.norm.weight, source.model.norm.weight)
    assert torch.equal(model.head.scores.weight, source.lm_head.weight)
    new = new_parameters(model)
    assert {id(weight) for weight in new} == {
        id(part.weight) for part in model.modules() if isinstance(part, ZeroLinear)
    }
    assert not any(weight.any() for weight in new)


@pytest.mark.parametrize(("name", "sink"), [("llama, tied", True), ("qwen3, untied", False)])
def test_text_is_the_same_after_saving_alone_and_uncached(name, sink, tmp_path):
    source = source_of(name)
    model = calm_from_transformer(source, Tokenizer(size=37), 4, Cut(1, 2), sink=sink)
    assert can_step(model)
    for weight in new_parameters(model):
        torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path)
    loaded = CalmForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(model(IDS, labels=IDS).loss, loaded(IDS, labels=IDS).loss)
    settings = {"max_new_tokens": 12, "temperature": 0.0, "sampler": "head"}
    text = model.generate(IDS, **settings)
    assert torch.equal(text, loaded.generate(IDS, **settings))
    assert torch.equal(text, model.generate(IDS, cache_implementation="dynamic", **settings))
    for row in range(2):
        alone = model.generate(IDS[row : row + 1], **settings)[0]
        assert torch.equal(alone, text[row, : len(alone)])
    # Every chunk that was generated with a cache is also drawn after an uncached pass.
    new = text.shape[1] - IDS.shape[1]
    for first in range(IDS.shape[1], IDS.shape[1] + new // 4 * 4, 4):
        state = model.hidden_states_of_chunks(text[:, :first])[:, -1]
        chunk = model.head.draw_chunks(model.head.prepare(state), 1, temperature=0.0)[0]
        is_text = text[:, first : first + 4] != 0
        assert torch.equal(chunk[is_text], text[:, first : first + 4][is_text])


def test_flops_are_counted_by_part():
    source = source_of("llama, tied")
    source_costs = cost_of(source.config).inference
    layer = source_costs["backbone"] / 6
    model = calm_from_transformer(source, Tokenizer(), 4, Cut(1, 2))
    costs = cost_of(model.config)
    assert costs.inference["backbone"] == 4 * layer / 4
    assert costs.inference["input"] == 2 * 16 * 16
    # Layers, FLOPs per entry of a key, average number of keys with the sink, width of the queries.
    attention = 3 * 4 * 3.5 * 4 * 6
    without = cost_of(calm_from_transformer(source, Tokenizer(), 4, Cut(1, 2), sink=False).config)
    assert costs.inference["head"] - without.inference["head"] == pytest.approx(attention / 3.5)
    expected = 3 * layer + attention + 2 * 40 * 16 + 2 * 3 * 16 * 16 / 4
    assert costs.inference["head"] == pytest.approx(expected)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    assert sum(costs.parameters.values()) == num_parameters


def test_sink_is_bos_or_else_eos():
    source = source_of("mistral")
    sink_with_bos, sink_without_bos = (
        calm_from_transformer(source, Tokenizer(bos=bos), 2, Cut(1, 1)).head.first.layers[0].sink_key
        for bos in (2, None)
    )
    assert torch.equal(sink_with_bos, sink_without_bos)


def test_sliding_windows_of_unused_layers_do_not_matter():
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
    config = Qwen3Config(**SIZES, **windows)
    assert config.layer_types == ["full_attention"] * 4 + ["sliding_attention"] * 2
    check_source(config, Tokenizer(), Cut(1, 1, [0, 1, 2, 3]))
    with pytest.raises(InputError, match="sees only 8 tokens"):
        check_source(config, Tokenizer(), Cut(1, 1))


def test_attention_dropout_is_in_all_layers():
    source = source_of("llama, tied")
    source.config.attention_dropout = 0.5
    model = calm_from_transformer(source, Tokenizer(), 4, Cut(1, 2))
    layers = [*model.backbone.layers, *model.head.first.layers, *model.head.last.layers]
    assert {layer.self_attn.attention_dropout for layer in layers} == {0.5}
    states = torch.randn(8, 32, dtype=torch.float64)
    tokens = torch.randint(3, 40, (8, 4))
    assert torch.equal(model.head._vectors(states, tokens), model.head._vectors(states, tokens))
    model.train()
    assert not torch.equal(model.head._vectors(states, tokens), model.head._vectors(states, tokens))


def test_chunks_of_one_token_cannot_have_first_layers():
    source = source_of("mistral")
    with pytest.raises(InputError, match="set first_layers to 0, not 2"):
        calm_from_transformer(source, Tokenizer(), 1, Cut(2, 1))
    model = calm_from_transformer(source, Tokenizer(), 1, Cut(0, 1))
    assert all(weight.numel() for weight in model.parameters()), "optimizers cannot train empty parameters"
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


REFUSED = {
    "another architecture": (GPT2Config(), {}, "a model of type 'gpt2' cannot be converted to a CALM"),
    "an image model": (CLIPConfig(), {}, "a model of type 'clip' cannot be converted to a CALM"),
    "a window": (MistralConfig(**SIZES, sliding_window=8), {}, "sees only 8 tokens"),
    "quantized": (
        LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq", "bits": 4}),
        {},
        "quantized",
    ),
    "partial rotation": (
        LlamaConfig(**SIZES, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
        {},
        "partial_rotary_factor 0.5",
    ),
    "too many tokens": (SOURCES["mistral"], {"size": 41}, "41 tokens, more than the 40"),
    "no padding": (SOURCES["mistral"], {"pad": None}, "a different token for padding"),
    "padding that is EOS": (SOURCES["mistral"], {"pad": 2}, "a different token for padding"),
}


@pytest.mark.parametrize(("config", "tokens", "message"), REFUSED.values(), ids=REFUSED)
def test_unsupported_sources_are_refused(config, tokens, message):
    with pytest.raises(InputError, match=message):
        check_source(config, Tokenizer(**tokens), Cut(1, 1))


def test_source_that_is_tied_only_in_its_configuration_is_refused():
    source = source_of("llama, tied")
    source.lm_head.weight = torch.nn.Parameter(source.lm_head.weight.detach().clone())
    calm_from_transformer(source, Tokenizer(), 2, Cut(1, 1))  # Equal weights are as good as tied ones.
    with torch.no_grad():
        source.lm_head.weight[3] += 1
    with pytest.raises(InputError, match="but their weights differ; set its tie_word_embeddings to false"):
        calm_from_transformer(source, Tokenizer(), 2, Cut(1, 1))
    source.config.tie_word_embeddings = False
    model = calm_from_transformer(source, Tokenizer(), 1, Cut(0, 0))
    expected = source(IDS).logits[:, :-1].flatten(0, 1)
    assert_close(logits_of(model, IDS), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", [Cut(4, 3), Cut(0, 6), Cut(-1, 1), Cut(1, 1, [0, 6]), Cut(1, 1, [1, 0])])
def test_invalid_cuts_are_refused(cut):
    with pytest.raises(InputError, match="layers"):
        cut.split(6)


INVALID = {
    "an activation": ({"hidden_act": "evil"}, "hidden_act must name a transformers activation.*'evil'"),
    "position settings": (
        {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
        "rope_parameters must be rotary settings",
    ),
    "a negative base of positions": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1}},
        "rope_theta must be above 0",
    ),
    "a huge number of layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be .*, got 1000000000"),
    "a negative number of layers": ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1"),
    "a number of layers as text": ({"num_hidden_layers": "4"}, "num_hidden_layers"),
    "a negative width": ({"hidden_size": -16}, "hidden_size must be at least 1"),
    "a huge width": ({"hidden_size": 2**40}, "hidden_size must be at least 1 and at most"),
    "a huge vocabulary": ({"vocab_size": 10**12}, "vocab_size must be at least 1 and at most"),
    "a width that heads do not divide": ({"num_attention_heads": 3}, "attention heads"),
    "heads that key-value heads do not divide": (
        {"num_key_value_heads": 3},
        "multiple of num_key_value_heads 3, got 4",
    ),
    "no heads": ({"num_attention_heads": 0}, "the configuration in .* cannot be read"),
    "heads of size 0": ({"head_dim": 0}, "head_dim must be at least 1"),
    "heads of odd size": ({"head_dim": 3}, "head_dim must be even"),
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be above 0"),
}


@pytest.mark.parametrize(("changes", "message"), INVALID.values(), ids=INVALID)
def test_invalid_configuration_is_refused_before_anything_is_built(changes, message, tmp_path):
    values = SOURCES["llama, scaled positions"].to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    for read in (lambda: load_config(tmp_path), lambda: config_of(str(tmp_path))):
        with pytest.raises(InputError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SOURCES)
def test_configurations_of_supported_sources_are_accepted(name, tmp_path):
    SOURCES[name].save_pretrained(tmp_path)
    assert load_config(tmp_path).model_type == SOURCES[name].model_type


@pytest.mark.parametrize("changes", [{"hidden_act": "evil"}, {"num_hidden_layers": 10**9}])
def test_invalid_configuration_made_in_python_is_refused(changes):
    config = LlamaConfig(**SIZES)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=next(iter(changes))):
        check_source(config, Tokenizer(), Cut(1, 1))
    if "hidden_act" in changes:
        with pytest.raises(InputError, match="no model can be built from the configuration"):
            cost_of(config)


@pytest.mark.parametrize("changes", [{"hidden_act": "evil"}, {"rope_parameters": {"rope_type": "foo"}}])
def test_calm_with_invalid_layers_is_refused(changes):
    with pytest.raises(ValueError, match=f"backbone_config: .*{next(iter(changes))}"):
        CalmConfig(backbone_config=SIZES | changes)
