"""`generate`: caches, prompts of any length, EOS, budgets, seeds, streaming, and bad arguments."""

import numpy as np
import pytest
import torch
from recorders import RecordingStreamer
from tiny import BOS, EOS, HEADS, PAD, tiny_model
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import CompileConfig, GenerationConfig, TextIteratorStreamer

import calm.core.temperature as temperature_module
import calm.models.generation.sampling as sampling_module
from calm.core.chunks import align_to_chunks
from calm.core.samplers import PoolSampler
from calm.core.temperature import sample_from_pool
from calm.data.tokenizer import train_tokenizer
from calm.models.generation.lean import ChunkStep
from calm.models.generation.sampler_registry import sampler_from


def without_eos(model):
    """The model without an EOS token, so that lengths are predictable."""
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_cached_equals_uncached_for_every_prompt_length(chunk_size, temperature):
    model = without_eos(tiny_model(chunk_size))
    for length in range(1, 2 * chunk_size + 1):
        prompt = torch.randint(3, 40, (2, length))
        settings = {"max_new_tokens": 9, "temperature": temperature, "max_draws": 8, "seed": length}
        cached = model.generate(prompt, use_cache=True, **settings)
        uncached = model.generate(prompt, use_cache=False, **settings)
        assert cached.shape == (2, length + 9)
        assert (cached == uncached).all()
        assert (cached[:, :length] == prompt).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rotations_of_far_positions_match_the_backbone_in_16_bits(dtype):
    model = tiny_model(backbone_config={"max_position_embeddings": 2048}).to(
        dtype
    )  # With its rotary embeddings.
    position = torch.tensor([3, 300, 2001])
    actual = ChunkStep(model)._rotation(position)
    expected = model.backbone.rotary_emb(torch.zeros(3, 1, 1, dtype=dtype), position.unsqueeze(-1))
    assert_close(actual, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_static_cache_gives_the_same_text(temperature):
    model = without_eos(tiny_model(backbone_config={"max_position_embeddings": 128}))
    prompts = torch.tensor([[5, 6, 7, 8, 9, 11], [PAD, PAD, PAD, PAD, 7, 9]])
    settings = {"attention_mask": (prompts != PAD).long(), "temperature": temperature, "seed": 3}
    for num_tokens in (1, 4, 30, 300):  # The last does not fit into the smallest static cache.
        texts = [
            model.generate(prompts, max_new_tokens=num_tokens, cache_implementation=kind, **settings)
            for kind in ("dynamic", "static")
        ]
        assert (texts[0] == texts[1]).all()


def test_compiled_step_gives_the_same_text_and_is_compiled_once():
    model = without_eos(tiny_model())
    prompt = torch.randint(3, 40, (2, 6))
    options = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default")}
    counters["stats"].clear()
    for num_tokens in (13, 30, 21):
        settings = {"max_new_tokens": num_tokens, "temperature": 1.0, "seed": num_tokens}
        assert (model.generate(prompt, **settings, **options) == model.generate(prompt, **settings)).all()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "quantized"}, "must be 'dynamic' or 'static', got 'quantized'"),
        ({"compile_config": CompileConfig()}, "needs cache_implementation='static'"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported: .* no token scores"),
        ({"top_k": 5}, "top_k=5 is not supported"),
        ({"top_k": True}, "top_k=True is not supported"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids=.* is not supported"),
        ({"min_new_tokens": 3}, "min_new_tokens=3 is not supported: the end of a text is drawn"),
        ({"num_beams": 4}, "no beam search over chunks"),
        ({"output_scores": True}, "output_scores=True is not supported"),
        (
            {"generation_config": GenerationConfig(repetition_penalty=1.2)},
            "repetition_penalty=1.2 is not supported",
        ),
        ({"stop_strings": "a"}, "stop_strings need the model's tokenizer"),
        (
            {"max_new_tokens": 255},
            "2 tokens, and 255 new tokens are requested, more than the context of 256; request at most 252",
        ),
    ],
)
def test_unsupported_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(torch.tensor([[5, 6]]), **options)


def test_state_of_a_prompt_does_not_depend_on_the_rest_of_the_batch():
    """A prompt's last state is the same alone and beside a longer prompt, padded on either side."""
    model = tiny_model()
    long, short = torch.randint(3, 40, (11,)), torch.randint(3, 40, (3,))
    for pad_left in (True, False):
        padded = torch.nn.functional.pad(short, (8, 0) if pad_left else (0, 8), value=PAD)
        batch = torch.stack([long, padded])
        tokens, mask = align_to_chunks(batch, (batch != PAD).long(), 4, PAD)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        together = model.forward_chunks(tokens, mask, positions)[:, -1]
        for row, prompt in enumerate((long, short)):
            alone, _ = align_to_chunks(prompt[None], torch.ones(1, len(prompt)), 4, PAD)
            expected = model.hidden_states_of_chunks(alone)[0, -1]
            assert_close(together[row], expected, rtol=1e-4, atol=1e-5)


def test_batch_continues_each_prompt():
    model = without_eos(tiny_model())
    batch = torch.tensor([[5, 6, 7, 8, 9], [PAD, PAD, PAD, 7, 9]])
    out = model.generate(batch, attention_mask=(batch != PAD).long(), max_new_tokens=6, seed=0)
    assert out.shape == (2, 11)
    assert (out[:, :5] == batch).all()


class ScriptedDraws:
    """Replaces the draws of a model: at each step, the next list has a chunk for each open row."""

    def __init__(self, model, chunks):
        self.chunks = iter(chunks)
        model.sample_chunks = self

    def __call__(self, hidden_PD, settings, randomness=None, compiled=None):
        chunk_PK = torch.tensor(next(self.chunks)).reshape(len(hidden_PD), -1)
        return sample_from_pool(chunk_PK.expand(4, -1, -1), settings.temperature)


@pytest.mark.parametrize("use_cache", [True, False])
def test_stops_at_eos_inside_a_chunk_and_drops_the_rest(use_cache):
    model = tiny_model()
    ScriptedDraws(model, [[10, 11, 12, 13], [14, EOS, 15, 16], [17, 18, 19, 20]])
    out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=20, use_cache=use_cache)
    assert out.tolist() == [[5, 6, 10, 11, 12, 13, 14, EOS]]


def test_ended_rows_are_padded():
    model = tiny_model()
    ScriptedDraws(
        model,
        [[[10, EOS, 9, 9], [20, 21, 22, 23]], [[24, 25, EOS, 8]], [[1, 1, 1, 1]]],
    )
    out = model.generate(torch.tensor([[5], [6]]), max_new_tokens=12)
    assert out.tolist() == [[5, 10, EOS, PAD, PAD, PAD, PAD, PAD], [6, 20, 21, 22, 23, 24, 25, EOS]]


@pytest.mark.parametrize("budget", range(1, 10))
def test_budget_is_met_and_never_exceeded(budget):
    model = without_eos(tiny_model())
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=budget).shape == (1, 3 + budget)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_length=3 + budget).shape == (1, 3 + budget)


def test_an_eos_beyond_the_budget_is_not_written():
    model = tiny_model()
    ScriptedDraws(model, [[10, 11, EOS, 9]])
    assert model.generate(torch.tensor([[5]]), max_new_tokens=2).tolist() == [[5, 10, 11]]


@pytest.mark.parametrize("sampler", ["exact", "pool"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1 / 3, 0.0])
def test_same_seed_same_text(sampler, temperature):
    model = without_eos(tiny_model())
    prompt = torch.randint(3, 40, (3, 5))
    settings = {
        "max_new_tokens": 16,
        "temperature": temperature,
        "sampler": sampler,
        "num_draws": 5,
        "max_draws": 7,
    }
    first, second = (model.generate(prompt, seed=7, **settings) for _ in range(2))
    assert (first == second).all()
    assert (model.generate(prompt, seed=8, **settings) != first).any()
    first, second = (
        model.generate(prompt, generator=torch.Generator().manual_seed(7), **settings) for _ in range(2)
    )
    assert (first == second).all()


def test_seed_must_be_an_integer_and_excludes_a_generator():
    model, prompt = without_eos(tiny_model()), torch.randint(3, 40, (3, 5))
    first = model.generate(prompt, seed=7, max_new_tokens=8)
    for seed in (np.int64(7), np.int32(7), torch.tensor(7)):
        assert torch.equal(model.generate(prompt, seed=seed, max_new_tokens=8), first)
    for seed in (True, 7.0, "7"):
        with pytest.raises(ValueError, match="a seed must be a whole number"):
            model.generate(prompt, seed=seed, max_new_tokens=8)
    with pytest.raises(ValueError, match="give either a seed or a generator, not both"):
        model.generate(prompt, seed=7, generator=torch.Generator(), max_new_tokens=8)


@pytest.mark.parametrize("sampler", ["exact", "pool"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_row_is_the_same_alone_and_in_a_batch(sampler, temperature):
    """Eight left-padded prompts of different lengths; a row that ends early does not change the others."""
    model = (
        tiny_model().double()
    )  # Rounding depends on the batch's shape; in double precision it decides nothing.
    prompts = [torch.randint(3, 40, (length,)).tolist() for length in range(2, 10)]
    batch = torch.tensor([[PAD] * (9 - len(prompt)) + prompt for prompt in prompts])
    settings = {
        "max_new_tokens": 40,
        "temperature": temperature,
        "sampler": sampler,
        "num_draws": 20,
        "seed": 3,
        "eos_token_id": list(range(30, 36)),
    }
    together = model.generate(batch, attention_mask=(batch != PAD).long(), **settings)
    lengths = set()
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :]
        lengths.add(len(alone))
        assert together[row, 9 : 9 + len(alone)].tolist() == alone.tolist()
        assert (together[row, 9 + len(alone) :] == PAD).all()
    assert len(lengths) > 1  # Some rows ended before others.


@pytest.mark.parametrize("few_draws", [0, 20, 1000])
@pytest.mark.parametrize("settings", [{"temperature": 0.5}, {"temperature": 0.3, "sampler": "pool"}, {}])
def test_reading_only_needed_tokens_of_draws_gives_the_same_text(monkeypatch, few_draws, settings):
    model = without_eos(tiny_model().double())
    prompt = torch.randint(3, 40, (3, 5))

    def write():
        return model.generate(prompt, max_new_tokens=20, seed=2, num_draws=30, max_draws=30, **settings)

    monkeypatch.setattr(temperature_module, "_FIRST_BLOCK_WITH_READER", temperature_module._FIRST_BLOCK)
    expected = write()
    monkeypatch.setattr(sampling_module, "_LARGE_PROJECTION", 1)
    monkeypatch.setattr(sampling_module, "_FEW_DRAWS", few_draws)
    monkeypatch.setattr(model.autoencoder, "decode_tokens", None)  # It must not be used.
    assert (write() == expected).all()


def test_statistics_on_request():
    model = tiny_model()
    ScriptedDraws(model, [[[10, EOS, 9, 9], [20, 21, 22, 23]], [[24, 25, EOS, 8]]])
    out = model.generate(torch.tensor([[5], [6]]), max_new_tokens=12, return_dict_in_generate=True)
    assert out.num_draws.tolist() == [[4, 0], [4, 4]]
    assert out.agreement.tolist() == [[1, 0], [1, 1]]
    assert not out.fell_back.any() and out.sequences.shape == (2, 8)


@pytest.mark.parametrize(
    "extra", [{"num_draws": 8}, {"max_draws": 8}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str
)
def test_a_sampler_brings_its_own_settings(extra):
    model, prompt = without_eos(tiny_model()), torch.tensor([[5, 6, 7, 8]])
    sampler = PoolSampler(temperature=0.5, num_draws=8)
    text = model.generate(prompt, sampler=sampler, seed=1, max_new_tokens=8)
    named = {"sampler": "pool", "temperature": 0.5, "num_draws": 8}
    assert torch.equal(text, model.generate(prompt, **named, seed=1, max_new_tokens=8))
    with pytest.raises(ValueError, match="a sampler object brings its own settings"):
        model.generate(prompt, sampler=sampler, seed=1, max_new_tokens=8, **extra)


def test_statistics_of_both_samplers():
    model = without_eos(tiny_model())
    settings = {"max_new_tokens": 16, "temperature": 0.4, "return_dict_in_generate": True, "seed": 0}
    pool = model.generate(torch.tensor([[5, 6]]), sampler="pool", num_draws=30, **settings)
    assert (pool.num_draws == 30).all() and not pool.fell_back.any()
    exact = model.generate(torch.tensor([[5, 6]]), max_draws=40, **settings)
    assert ((exact.num_needed >= 3) & (exact.num_needed <= exact.num_draws)).all()
    assert (exact.num_draws <= 40).all() and (exact.num_draws[exact.fell_back] == 40).all()
    assert ((exact.agreement > 0) & (exact.agreement <= 1)).all()


def test_standard_streamers_get_the_text():
    tokenizer = train_tokenizer(["one two three four"], 300)
    model = without_eos(tiny_model(vocab_size=len(tokenizer)))
    prompt = tokenizer("one two", return_tensors="pt")["input_ids"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = model.generate(prompt, max_new_tokens=11, seed=1, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("head_type", HEADS)
def test_states_that_are_not_finite_are_refused(head_type):
    model = tiny_model(head_config={"head_type": head_type})
    with torch.no_grad():
        model.backbone.layers[-1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=4)


def test_empty_batch_is_refused(model):
    with pytest.raises(ValueError, match="the batch is empty"):
        model.sample_chunks(torch.zeros(0, model.config.backbone.hidden_size), sampler_from())


def test_several_sequences_per_prompt():
    model = without_eos(tiny_model())
    prompt = torch.tensor([[5, 6], [7, 8]])
    out = model.generate(prompt, num_return_sequences=3, max_new_tokens=8, seed=0)
    assert out.shape == (6, 10)
    assert (out[:, :2] == prompt.repeat_interleave(3, 0)).all()
    assert len({tuple(row) for row in out[:3].tolist()}) > 1


def test_text_without_a_prompt_starts_with_bos():
    assert tiny_model().generate(max_new_tokens=4, seed=0)[0, 0] == BOS


def test_arguments_override_the_generation_config():
    model = without_eos(tiny_model())
    config = GenerationConfig(max_new_tokens=5, temperature=0.5, do_sample=True)
    prompt = torch.tensor([[5, 6]])
    assert model.generate(prompt, generation_config=config, num_draws=4).shape == (1, 7)
    assert model.generate(prompt, generation_config=config, num_draws=4, max_new_tokens=3).shape == (1, 5)


def test_generation_config_cannot_request_greedy_decoding(model):
    config = GenerationConfig(max_new_tokens=5, do_sample=False)
    with pytest.raises(ValueError, match="greedy decoding is not available for chunks"):
        model.generate(torch.tensor([[5, 6]]), generation_config=config)
    assert model.generate(torch.tensor([[5, 6]]), generation_config=config, do_sample=True).shape[1] <= 7


def test_settings_missing_in_a_generation_config_are_the_models_own():
    model, prompt = without_eos(tiny_model()), torch.tensor([[5, 6]])
    model.generation_config.update(temperature=0.5, max_new_tokens=9, return_dict_in_generate=True)
    written = model.generate(prompt, generation_config=GenerationConfig(max_time=900.0), num_draws=8)
    assert written.sequences.shape == (1, 11)
    assert int(written.num_draws.min()) > 1  # As at a temperature below 1.
    written = model.generate(prompt, generation_config=GenerationConfig(max_length=6), num_draws=8)
    assert written.sequences.shape == (1, 6)


@pytest.mark.parametrize("budget", [5, 6, 7, 20])
def test_streamer_gets_the_text_and_no_more(budget):
    model = tiny_model()
    ScriptedDraws(model, [[10, 11, 12, 13], [14, 15, EOS, 16]])
    streamer = RecordingStreamer()
    out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=budget, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.has_ended


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 1.5}, "temperature must lie between 0 and 1"),
        ({"temperature": 0.3, "max_draws": 3}, "at least 4 draws, got max_draws=3"),
        ({"temperature": 0.3, "sampler": "pool", "num_draws": 3}, "at least 4 draws, got num_draws=3"),
        ({"temperature": 0.5, "top_p": 0.9, "sampler": "exact"}, "use them with sampler='pool'"),
        ({"sampler": "beam"}, "sampler must be one of exact, pool"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number of at least 1, got 0"),
        ({"num_return_sequences": -1}, "of at least 1, got -1"),
        ({"num_return_sequences": 1.5}, r"of at least 1, got 1\.5"),
        ({"max_length": 2}, "no room for new tokens"),
        ({"color": "red"}, "does not support the argument"),
        ({"do_sample": False}, "greedy decoding is not available for chunks"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, 6]]), **arguments)


def test_bad_prompts_are_refused(model):
    with pytest.raises(ValueError, match="non-empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="a prompt is empty"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), attention_mask=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model.generate(torch.ones(1, 2, dtype=torch.long), attention_mask=torch.ones(1, 3))
