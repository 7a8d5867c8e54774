"""What ends a text besides EOS, and prompts that do or do not fit in the context."""

import logging
import time

import pytest
import torch
from tiny import PAD, tiny_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from calm.core.temperature import sample_from_pool
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.models.context import longest_context, remaining_context
from calm.models.loading import load_language_model_and_tokenizer
from calm.texts import continue_texts, continue_tokens

PROMPT = "one two"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five six seven"] * 9, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return tiny_model(vocab_size=len(tokenizer))


def scripted_text(model, tokenizer, monkeypatch, text, **arguments):
    """What `generate` returns after the prompt if the model draws the chunks of a text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    chunks = iter(torch.tensor(ids + [5] * (-len(ids) % 4)).split(4))

    def sample(hidden_PD, settings, randomness=None, compiled=None):
        return sample_from_pool(next(chunks).expand(4, 1, -1), 1.0)

    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with monkeypatch.context() as patch:
        patch.setattr(model, "sample_chunks", sample)
        out = model.generate(prompt, max_new_tokens=len(ids), tokenizer=tokenizer, **arguments)
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("stops", [" four", ["zzz", "five"], ["our", "three"], "e f", "nine", ["n", "r f"]])
def test_a_text_ends_with_the_token_that_completes_a_stop_string(stops, model, tokenizer, monkeypatch):
    text = " three four five six seven"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    listed = [stops] if isinstance(stops, str) else stops
    ends = [n for n in range(len(ids)) if any(stop in tokenizer.decode(ids[: n + 1]) for stop in listed)]
    actual = scripted_text(model, tokenizer, monkeypatch, text, stop_strings=stops)
    assert actual == ids[: ends[0] + 1 if ends else None]


def test_stop_strings_of_a_generation_config_apply_to_every_row(model, tokenizer):
    prompts = torch.tensor([[PAD, 5, 6], [7, 8, 9]])
    settings = {
        "attention_mask": (prompts != PAD).long(),
        "max_new_tokens": 24,
        "seed": 5,
        "temperature": 1.0,
    }
    free = model.generate(prompts, **settings)[:, 3:].tolist()
    tokens = [row[5] for row in free]
    stops = [tokenizer.decode([token]) for token in tokens]
    config = GenerationConfig(stop_strings=stops, max_new_tokens=24)
    out = model.generate(prompts, generation_config=config, tokenizer=tokenizer, **settings)[:, 3:].tolist()
    for row, free_row in zip(out, free, strict=True):
        kept = [token for token in row if token != PAD]
        assert 0 < len(kept) <= 6 and kept == free_row[: len(kept)]
    assert max(len([token for token in row if token != PAD]) for row in out) == len(out[0])


class StopAtToken(StoppingCriteria):
    """Ends a text at a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        return input_ids[:, -1] == self.token


def test_stopping_criteria_are_checked_after_every_token(model):
    prompt, settings = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 20, "seed": 3, "temperature": 1.0}
    free = model.generate(prompt, **settings)[0, 3:].tolist()
    for index in (0, 2, 5, 11):
        out = model.generate(prompt, stopping_criteria=[StopAtToken(free[index])], **settings)[0, 3:].tolist()
        assert out == free[: free.index(free[index]) + 1]


def test_eos_before_a_stop_string_ends_the_text(model, tokenizer, monkeypatch):
    three = tokenizer(" three", add_special_tokens=False)["input_ids"]
    actual = scripted_text(
        model, tokenizer, monkeypatch, " three four", stop_strings="four", eos_token_id=three[-1:]
    )
    assert actual == three


def test_time_limit_ends_a_text_after_a_whole_chunk(model, monkeypatch):
    monkeypatch.setattr(time, "monotonic", iter(range(0, 1000, 10)).__next__)
    out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=100, max_time=25, seed=3, temperature=1.0)
    assert out.shape == (1, 2 + 3 * 4)


def test_prompt_and_new_tokens_must_fit(model, tokenizer):
    assert longest_context(model.config) == 256
    assert [remaining_context(model.config, n) for n in (1, 4, 5, 252, 253, 256, 999)] == [
        252,
        252,
        248,
        4,
        0,
        0,
        0,
    ]
    long = list(range(3, 63)) * 5
    with pytest.raises(
        ValueError, match="300 tokens, and 1 new tokens are requested, more than the context of 256; shorten"
    ):
        model.generate(torch.tensor([long]))
    with pytest.raises(
        InputError, match="300 tokens, and 8 new tokens are requested, more than the context of 256; shorten"
    ):
        continue_tokens(model, tokenizer, [long[:3], long], max_new_tokens=8)
    with pytest.raises(
        InputError, match=r"3 tokens, and 254 new tokens are requested, .* request at most 252"
    ):
        continue_tokens(model, tokenizer, [long[:3]], max_new_tokens=254)
    assert model.generate(torch.tensor([long[:250]]), eos_token_id=[]).shape == (1, 254)  # The most that fit.
    assert continue_tokens(model, tokenizer, [long[:250]]).shape[1] <= 4


def test_cropping_is_logged(model, tokenizer, caplog):
    long = list(range(3, 63)) * 5
    with caplog.at_level(logging.WARNING, "calm"):
        new = continue_tokens(model, tokenizer, [long, long[:3]], max_new_tokens=8, crop=True, seed=1)
    assert "1 of 2 prompts cropped from the left to their last 248 tokens" in caplog.text
    alone = continue_tokens(model, tokenizer, [long[-248:], long[:3]], max_new_tokens=8, seed=1)
    assert new.tolist() == alone.tolist()
    with pytest.raises(InputError, match="256 new tokens leave no room for a prompt in the context of 256"):
        continue_tokens(model, tokenizer, [long], max_new_tokens=256, crop=True)


def test_prompts_of_token_level_models_must_fit_too(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(InputError, match="requested, more than the context of 32; shorten the prompt"):
        continue_texts(model, tokenizer, ["one two three four " * 20])
    for num_texts, stream in ((0, False), (-1, False), (0, True), (-1, True)):
        with pytest.raises(InputError, match=f"num_return_sequences must be .* at least 1, got {num_texts}"):
            continue_texts(model, tokenizer, ["one two"], num_return_sequences=num_texts, stream=stream)
    [text] = continue_texts(model, tokenizer, ["one two " * 30], crop=True, max_new_tokens=4, seed=1)
    assert isinstance(text, str)


def test_a_prompt_that_fits_is_not_cropped_for_more_new_tokens(model, tokenizer, caplog):
    long, settings = list(range(3, 63)) * 5, {"crop": True, "seed": 1, "eos_token_id": []}
    with caplog.at_level(logging.WARNING, "calm"):
        for length, room in ((140, 116), (250, 4)):
            assert continue_tokens(model, tokenizer, [long[:length]], **settings).shape == (1, room)
        assert not caplog.text
        assert continue_tokens(model, tokenizer, [long, long[:3]], at_most=999, **settings).shape == (2, 126)
    assert "1 of 2 prompts cropped from the left to their last 128 tokens" in caplog.text


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [
        (7, 9, ([7, 1], [9, 1])),
        ([7, 1], 9, ([7, 1], [9, 1])),  # As in a fine-tuned model whose base had the other token.
        ([7, 1], None, ([7, 1], [1])),
        (1, [9, 1], (1, [9, 1])),
    ],
)
def test_loaded_model_stops_at_its_own_eos_and_the_tokenizers(
    in_config, in_generation_config, expected, tokenizer, tmp_path
):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes))
    model.config.eos_token_id, model.generation_config.eos_token_id = in_config, in_generation_config
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_language_model_and_tokenizer(str(tmp_path))
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == expected


@pytest.mark.parametrize("ids", [[[5, -1]], [[5, 10**6]]])
def test_token_ids_outside_the_vocabulary_are_refused(ids, model):
    with pytest.raises(ValueError, match="token ids must be between 0 and"):
        model.generate(torch.tensor(ids))


def test_warning_if_every_prompt_ends_with_eos(model, caplog):
    with caplog.at_level(logging.WARNING, "calm"):
        model.generate(torch.tensor([[5, 6, 1], [7, 1, 9]]), max_new_tokens=4)
        model.generate(torch.tensor([[1]]), max_new_tokens=4)
        assert not caplog.text
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        model.generate(torch.tensor([[5, 6, 1], [7, 1, 9]]), attention_mask=mask, max_new_tokens=4)
    assert "Every prompt ends with an EOS token" in caplog.text
