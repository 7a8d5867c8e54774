"""A Transformer becomes a CALM: against the Transformer itself, and against its layers used by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
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
SOURCES: dict[str, PreTrainedConfig] = {
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=6),
    "llama, scaled positions": LlamaConfig(**SIZES, rope_parameters=ROPE, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
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
    return model.head._vectors(states, chunks) @ model.head._table()[0].T


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("name", SOURCES)
def test_with_chunks_of_one_token_it_is_the_source(name, first):
    source = source_of(name)
    model = calm_from_transformer(source, Tokenizer(), 1, Cut(first, 0))
    with torch.no_grad():
        scores, wanted = scores_of(model, ids), source(ids).logits[:, :-1].flatten(0, 1)
        assert_close(scores, wanted, rtol=0, atol=1e-10)
        loss = model(ids, labels=ids).loss
    assert_close(loss, F.cross_entropy(wanted, ids[:, 1:].flatten()).float())


def scores_by_hand(source, tokens, size: int, first: int, last: int):
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
    begin = network.embed_tokens(torch.tensor([1]))
    sink = run(layers[: len(layers) - last], begin)
    scores = []
    for chunk in range(1, len(tokens) // size):
        window = embedded[chunk * size - 1 : chunk * size + size - 1]
        read = run(layers[:first], torch.cat([begin, window]))[1:]
        state = states[chunk - 1]
        places = torch.cat([state[None], read[1:] + (state - read[0])])
        written = run(layers[len(layers) - last :], torch.cat([sink, places]))[1:]
        scores.append(source.lm_head(network.norm(written)))
    return torch.stack(scores)


@pytest.mark.parametrize(("size", "first", "last"), [(2, 1, 2), (4, 2, 3), (4, 0, 1), (3, 1, 0)])
@pytest.mark.parametrize("name", ["llama, tied", "qwen2"])
def test_before_training_it_is_the_layers_of_the_source(name, size, first, last):
    source = source_of(name)
    model = calm_from_transformer(source, Tokenizer(), size, Cut(first, last))
    with torch.no_grad():
        wanted = scores_by_hand(source, ids[0], size, first, last)
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


def test_writing_saving_and_reading_in_any_company_agree(tmp_path):
    source = source_of("llama, tied")
    model = calm_from_transformer(source, Tokenizer(), 4, Cut(1, 2))
    for weight in new_parameters(model):
        torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path)
    again = CalmForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(model(ids, labels=ids).loss, again(ids, labels=ids).loss)
    how = {"max_new_tokens": 12, "temperature": 0.0, "sampler": "head"}
    written = model.generate(ids, **how)
    assert torch.equal(written, again.generate(ids, **how))
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


REFUSED = {
    "another architecture": (GPT2Config(), {}, "a model of type 'gpt2' cannot become a CALM"),
    "norms of queries": (Qwen3Config(), {}, "normalize queries and keys"),
    "a window": (MistralConfig(**SIZES, sliding_window=8), {}, "sees only 8 tokens"),
    "too many tokens": (SOURCES["mistral"], {"size": 41}, "41 tokens, more than the 40"),
    "no padding": (SOURCES["mistral"], {"pad": None}, "another one for padding"),
    "padding that ends": (SOURCES["mistral"], {"pad": 2}, "another one for padding"),
}


@pytest.mark.parametrize(("config", "tokens", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(config, tokens, message):
    with pytest.raises(InputError, match=message):
        check_source(config, Tokenizer(**tokens))


@pytest.mark.parametrize("cut", [Cut(4, 3), Cut(0, 6), Cut(-1, 1), Cut(1, 1, [0, 6]), Cut(1, 1, [1, 0])])
def test_cuts_that_cannot_be_are_refused(cut):
    with pytest.raises(InputError, match="layers"):
        cut.of(6)
