"""A Transformer becomes a CALM: against the Transformer itself, and against its layers used by hand."""

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
    "mistral, a window of all": MistralConfig(**SIZES, sliding_window=64),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True),
    "qwen3, untied": Qwen3Config(**SIZES, head_dim=4, attention_bias=True),
}
ids = torch.randint(3, 40, (2, 24), generator=torch.Generator().manual_seed(5))


class Tokenizer:
    """What a conversion asks of a tokenizer."""

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


def scores_of(model: CalmForCausalLM, tokens):
    """Scores of all tokens of the chunks after the first, (B·(C - 1)·K, V)."""
    states = model.hidden_states_of_chunks(tokens)[:, :-1].flatten(0, 1)
    chunks = tokens.unflatten(-1, (-1, model.config.chunk_size))[:, 1:].flatten(0, 1)
    return model.head._vectors(states, chunks) @ model.head._vocabulary().table_VX.T


@pytest.mark.parametrize("name", SOURCES)
def test_with_chunks_of_one_token_it_is_the_source(name):
    source = source_of(name)
    model = calm_from_transformer(source, Tokenizer(), 1, Cut(0, 0))
    with torch.no_grad():
        scores, wanted = scores_of(model, ids), source(ids).logits[:, :-1].flatten(0, 1)
        assert_close(scores, wanted, rtol=0, atol=1e-10)
        loss = model(ids, labels=ids).loss
    assert_close(loss, F.cross_entropy(wanted, ids[:, 1:].flatten()).float())


def test_in_half_precision_too():
    """Frequencies of positions are not halved: far from the beginning that would be another model."""
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(SOURCES["llama 3"], dtype=torch.bfloat16).eval()
    model = calm_from_transformer(source, Tokenizer(), 1, Cut(0, 0))
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    tokens = torch.randint(3, 40, (1, 64))
    with torch.no_grad():
        assert torch.equal(scores_of(model, tokens), source(tokens).logits[:, :-1].flatten(0, 1))


def scores_by_hand(source, tokens, size: int, first: int, last: int, sink: bool = True):
    """The scores of the converted model, (C - 1, K, V), from the layers of the source, chunk by chunk."""
    network, layers = source.model, list(source.model.layers)

    def run(some, x_TD):
        position = torch.arange(len(x_TD))[None]
        rotation, x = network.rotary_emb(x_TD[None], position), x_TD[None]
        for layer in some:
            x = layer(x, position_embeddings=rotation)
        return x[0]

    embedded = network.embed_tokens(tokens)
    states = run(layers[: len(layers) - last], embedded[size - 1 :: size])
    begin = network.embed_tokens(torch.tensor([1])[:sink])  # Nothing, where there is no sink.
    before = run(layers[: len(layers) - last], begin) if sink else begin
    scores = []
    for chunk in range(1, len(tokens) // size):
        window = embedded[chunk * size - 1 : chunk * size + size - 1]
        read = run(layers[:first], torch.cat([begin, window]))[len(begin) :]
        state = states[chunk - 1]
        places = torch.cat([state[None], read[1:] + (state - read[0])])
        written = run(layers[len(layers) - last :], torch.cat([before, places]))[len(begin) :]
        scores.append(source.lm_head(network.norm(written)))
    return torch.stack(scores)


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(("size", "first", "last"), [(2, 1, 2), (4, 2, 3), (4, 0, 1), (3, 1, 0)])
@pytest.mark.parametrize("name", ["llama, tied", "llama 3", "qwen2", "qwen3"])
def test_before_training_it_is_the_layers_of_the_source(name, size, first, last, sink):
    source = source_of(name)
    model = calm_from_transformer(source, Tokenizer(), size, Cut(first, last), sink=sink)
    assert any("sink" in key for key in model.state_dict()) == sink
    with torch.no_grad():
        wanted = scores_by_hand(source, ids[0], size, first, last, sink)
        assert_close(scores_of(model, ids[:1]).view_as(wanted), wanted, rtol=0, atol=1e-9)


def test_every_weight_is_that_of_the_source():
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
            left = {key for key in weights if not key.startswith("sink_")}
            assert left == {"self_attn.o_proj.bias"} and not weights["self_attn.o_proj.bias"].any()
    assert torch.equal(model.backbone.embed_tokens.weight, source.model.embed_tokens.weight)
    assert torch.equal(model.head.norm.weight, source.model.norm.weight)
    assert torch.equal(model.head.scores.weight, source.lm_head.weight)
    new = new_parameters(model)
    assert {id(one) for one in new} == {
        id(part.weight) for part in model.modules() if isinstance(part, ZeroLinear)
    }
    assert not any(one.any() for one in new)


@pytest.mark.parametrize(("name", "sink"), [("llama, tied", True), ("qwen3, untied", False)])
def test_writing_saving_and_reading_in_any_company_agree(name, sink, tmp_path):
    source = source_of(name)
    model = calm_from_transformer(source, Tokenizer(size=37), 4, Cut(1, 2), sink=sink)
    assert can_step(model)
    for weight in new_parameters(model):
        torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path)
    again = CalmForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(model(ids, labels=ids).loss, again(ids, labels=ids).loss)
    how = {"max_new_tokens": 12, "temperature": 0.0, "sampler": "head"}
    written = model.generate(ids, **how)
    assert torch.equal(written, again.generate(ids, **how))
    assert torch.equal(written, model.generate(ids, cache_implementation="dynamic", **how))
    for row in range(2):
        alone = model.generate(ids[row : row + 1], **how)[0]
        assert torch.equal(alone, written[row, : len(alone)])
    # Step by step with a cache, and at once.
    new = written.shape[1] - ids.shape[1]
    for first in range(ids.shape[1], ids.shape[1] + new // 4 * 4, 4):
        state = model.hidden_states_of_chunks(written[:, :first])[:, -1]
        chunk = model.head.draw_chunks(model.head.prepare(state), 1, temperature=0.0)[0]
        is_text = written[:, first : first + 4] != 0
        assert torch.equal(chunk[is_text], written[:, first : first + 4][is_text])


def test_flops_are_counted_by_part():
    source = source_of("llama, tied")
    of_source = cost_of(source.config).inference
    layer = of_source["backbone"] / 6
    model = calm_from_transformer(source, Tokenizer(), 4, Cut(1, 2))
    costs = cost_of(model.config)
    assert costs.inference["backbone"] == 4 * layer / 4
    assert costs.inference["input"] == 2 * 16 * 16
    attention = 3 * 4 * 3.5 * 4 * 6  # Layers, FLOPs, keys of a place on average, width of the queries.
    without = cost_of(calm_from_transformer(source, Tokenizer(), 4, Cut(1, 2), sink=False).config)
    assert costs.inference["head"] - without.inference["head"] == pytest.approx(attention / 3.5)
    wanted = 3 * layer + attention + 2 * 40 * 16 + 2 * 3 * 16 * 16 / 4
    assert costs.inference["head"] == pytest.approx(wanted)
    counted = sum(one.numel() for one in model.parameters())
    assert sum(costs.parameters.values()) == counted


def test_the_sink_is_the_beginning_of_a_text_or_else_its_end():
    source = source_of("mistral")
    with_bos, without = (
        calm_from_transformer(source, Tokenizer(bos=bos), 2, Cut(1, 1)).head.first.layers[0].sink_key
        for bos in (2, None)
    )
    assert torch.equal(with_bos, without)


def test_windows_of_layers_that_are_not_used_do_not_matter():
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
    config = Qwen3Config(**SIZES, **windows)
    assert config.layer_types == ["full_attention"] * 4 + ["sliding_attention"] * 2
    check_source(config, Tokenizer(), Cut(1, 1, [0, 1, 2, 3]))
    with pytest.raises(InputError, match="sees only 8 tokens"):
        check_source(config, Tokenizer(), Cut(1, 1))


def test_dropout_of_attention_is_in_all_layers():
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


def test_chunks_of_one_token_have_nothing_for_first_layers():
    source = source_of("mistral")
    with pytest.raises(InputError, match="set first_layers to 0, not 2"):
        calm_from_transformer(source, Tokenizer(), 1, Cut(2, 1))
    model = calm_from_transformer(source, Tokenizer(), 1, Cut(0, 1))
    assert all(one.numel() for one in model.parameters()), "nothing is empty, which no optimizer bears"
    model.train()(ids, labels=ids).loss.backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)


REFUSED = {
    "another architecture": (GPT2Config(), {}, "a model of type 'gpt2' cannot be converted to a CALM"),
    "an image model": (CLIPConfig(), {}, "a model of type 'clip' cannot be converted to a CALM"),
    "a window": (MistralConfig(**SIZES, sliding_window=8), {}, "sees only 8 tokens"),
    "quantized": (
        LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq", "bits": 4}),
        {},
        "quantized",
    ),
    "half rotated": (
        LlamaConfig(**SIZES, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
        {},
        "partial_rotary_factor 0.5",
    ),
    "too many tokens": (SOURCES["mistral"], {"size": 41}, "41 tokens, more than the 40"),
    "no padding": (SOURCES["mistral"], {"pad": None}, "a different token for padding"),
    "padding that ends": (SOURCES["mistral"], {"pad": 2}, "a different token for padding"),
}


@pytest.mark.parametrize(("config", "tokens", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(config, tokens, message):
    with pytest.raises(InputError, match=message):
        check_source(config, Tokenizer(**tokens), Cut(1, 1))


def test_a_source_that_is_tied_only_in_its_configuration_is_refused():
    source = source_of("llama, tied")
    source.lm_head.weight = torch.nn.Parameter(source.lm_head.weight.detach().clone())
    calm_from_transformer(source, Tokenizer(), 2, Cut(1, 1))  # Equal weights are as good as tied ones.
    with torch.no_grad():
        source.lm_head.weight[3] += 1
    with pytest.raises(InputError, match="but their weights differ; set its tie_word_embeddings to false"):
        calm_from_transformer(source, Tokenizer(), 2, Cut(1, 1))
    source.config.tie_word_embeddings = False
    model = calm_from_transformer(source, Tokenizer(), 1, Cut(0, 0))
    wanted = source(ids).logits[:, :-1].flatten(0, 1)
    assert_close(scores_of(model, ids), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cut", [Cut(4, 3), Cut(0, 6), Cut(-1, 1), Cut(1, 1, [0, 6]), Cut(1, 1, [1, 0])])
def test_cuts_that_cannot_be_are_refused(cut):
    with pytest.raises(InputError, match="layers"):
        cut.split(6)


ODD = {
    "an activation": ({"hidden_act": "evil"}, "hidden_act must name a transformers activation.*'evil'"),
    "positions": (
        {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
        "rope_parameters must be rotary settings",
    ),
    "a base": ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta must be above 0"),
    "many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be .*, got 1000000000"),
    "layers below 0": ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1"),
    "layers in words": ({"num_hidden_layers": "4"}, "num_hidden_layers"),
    "a width below 0": ({"hidden_size": -16}, "hidden_size must be at least 1"),
    "a width beyond all": ({"hidden_size": 2**40}, "hidden_size must be at least 1 and at most"),
    "a vocabulary beyond all": ({"vocab_size": 10**12}, "vocab_size must be at least 1 and at most"),
    "heads that do not part": ({"num_attention_heads": 3}, "attention heads"),
    "heads of keys": ({"num_key_value_heads": 3}, "multiple of num_key_value_heads 3, got 4"),
    "no head": ({"num_attention_heads": 0}, "."),
    "heads of size 0": ({"head_dim": 0}, "head_dim must be at least 1"),
    "heads of odd size": ({"head_dim": 3}, "head_dim must be even"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be above 0"),
}


@pytest.mark.parametrize(("changes", "message"), ODD.values(), ids=ODD)
def test_an_odd_configuration_is_refused_before_anything_is_counted_or_built(changes, message, tmp_path):
    values = SOURCES["llama, scaled positions"].to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    for read in (lambda: load_config(tmp_path), lambda: config_of(str(tmp_path))):
        with pytest.raises(InputError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SOURCES)
def test_a_configuration_of_its_kind_passes(name, tmp_path):
    SOURCES[name].save_pretrained(tmp_path)
    assert load_config(tmp_path).model_type == SOURCES[name].model_type


@pytest.mark.parametrize("changes", [{"hidden_act": "evil"}, {"num_hidden_layers": 10**9}])
def test_a_cut_and_costs_refuse_what_was_made_by_hand(changes):
    config = LlamaConfig(**SIZES)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=next(iter(changes))):
        check_source(config, Tokenizer(), Cut(1, 1))
    if "hidden_act" in changes:
        with pytest.raises(InputError, match="no model can be built from the configuration"):
            cost_of(config)


@pytest.mark.parametrize("changes", [{"hidden_act": "evil"}, {"rope_parameters": {"rope_type": "foo"}}])
def test_a_calm_of_odd_layers_is_refused(changes):
    with pytest.raises(ValueError, match=f"backbone_config: .*{next(iter(changes))}"):
        CalmConfig(backbone_config=SIZES | changes)
