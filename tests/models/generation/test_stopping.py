"""Ends of a text besides EOS, and prompts that the context holds or not."""

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


def written(model, tokenizer, monkeypatch, text, **arguments):
    """What is kept of a text that the model writes after the prompt."""
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
    wanted = [n for n in range(len(ids)) if any(stop in tokenizer.decode(ids[: n + 1]) for stop in listed)]
    kept = written(model, tokenizer, monkeypatch, text, stop_strings=stops)
    assert kept == ids[: wanted[0] + 1 if wanted else None]


def test_stop_strings_of_a_config_and_of_several_rows(model, tokenizer):
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
    for row, whole in zip(out, free, strict=True):
        kept = [token for token in row if token != PAD]
        assert 0 < len(kept) <= 6 and kept == whole[: len(kept)]
    assert max(len([token for token in row if token != PAD]) for row in out) == len(out[0])


class AtToken(StoppingCriteria):
    """Ends a text at a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        return input_ids[:, -1] == self.token


def test_criteria_of_transformers_are_asked_after_every_token(model):
    prompt, settings = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 20, "seed": 3, "temperature": 1.0}
    free = model.generate(prompt, **settings)[0, 3:].tolist()
    for place in (0, 2, 5, 11):
        out = model.generate(prompt, stopping_criteria=[AtToken(free[place])], **settings)[0, 3:].tolist()
        assert out == free[: free.index(free[place]) + 1]


def test_an_end_of_text_before_a_stop_ends_the_text(model, tokenizer, monkeypatch):
    three = tokenizer(" three", add_special_tokens=False)["input_ids"]
    kept = written(model, tokenizer, monkeypatch, " three four", stop_strings="four", eos_token_id=three[-1:])
    assert kept == three


def test_a_limit_of_time_ends_a_text_behind_a_whole_chunk(model, monkeypatch):
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
    assert model.generate(torch.tensor([long[:250]]), eos_token_id=[]).shape == (1, 254)  # As many as fit.
    assert continue_tokens(model, tokenizer, [long[:250]]).shape[1] <= 4


def test_what_is_cropped_is_said(model, tokenizer, caplog):
    long = list(range(3, 63)) * 5
    with caplog.at_level(logging.WARNING, "calm"):
        new = continue_tokens(model, tokenizer, [long, long[:3]], max_new_tokens=8, crop=True, seed=1)
    assert "1 of 2 prompts cropped from the left to their last 248 tokens" in caplog.text
    alone = continue_tokens(model, tokenizer, [long[-248:], long[:3]], max_new_tokens=8, seed=1)
    assert new.tolist() == alone.tolist()
    with pytest.raises(InputError, match="256 new tokens leave no room for a prompt in the context of 256"):
        continue_tokens(model, tokenizer, [long], max_new_tokens=256, crop=True)


def test_the_rule_is_the_same_for_models_of_tokens(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(InputError, match="requested, more than the context of 32; shorten the prompt"):
        continue_texts(model, tokenizer, ["one two three four " * 20])
    for number, stream in ((0, False), (-1, False), (0, True), (-1, True)):
        with pytest.raises(InputError, match=f"num_return_sequences must be .* at least 1, got {number}"):
            continue_texts(model, tokenizer, ["one two"], num_return_sequences=number, stream=stream)
    [text] = continue_texts(model, tokenizer, ["one two " * 30], crop=True, max_new_tokens=4, seed=1)
    assert isinstance(text, str)


def test_a_prompt_that_fits_is_not_cropped_for_more_new_tokens(model, tokenizer, caplog):
    long, how = list(range(3, 63)) * 5, {"crop": True, "seed": 1, "eos_token_id": []}
    with caplog.at_level(logging.WARNING, "calm"):
        for length, room in ((140, 116), (250, 4)):
            assert continue_tokens(model, tokenizer, [long[:length]], **how).shape == (1, room)
        assert not caplog.text
        assert continue_tokens(model, tokenizer, [long, long[:3]], at_most=999, **how).shape == (2, 126)
    assert "1 of 2 prompts cropped from the left to their last 128 tokens" in caplog.text


@pytest.mark.parametrize(
    ("own", "in_generation", "wanted"),
    [
        (7, 9, ([7, 1], [9, 1])),
        ([7, 1], 9, ([7, 1], [9, 1])),  # As left over from the model that this one was fine-tuned from.
        ([7, 1], None, ([7, 1], [1])),
        (1, [9, 1], (1, [9, 1])),
    ],
)
def test_a_models_texts_end_with_the_tokenizers_end_and_its_own(
    own, in_generation, wanted, tokenizer, tmp_path
):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes))
    model.config.eos_token_id, model.generation_config.eos_token_id = own, in_generation
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_language_model_and_tokenizer(str(tmp_path))
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == wanted


@pytest.mark.parametrize("ids", [[[5, -1]], [[5, 10**6]]])
def test_ids_that_no_token_has(ids, model):
    with pytest.raises(ValueError, match="token ids must be between 0 and"):
        model.generate(torch.tensor(ids))


def test_prompts_that_a_tokenizer_has_ended_are_told(model, caplog):
    with caplog.at_level(logging.WARNING, "calm"):
        model.generate(torch.tensor([[5, 6, 1], [7, 1, 9]]), max_new_tokens=4)
        model.generate(torch.tensor([[1]]), max_new_tokens=4)
        assert not caplog.text
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        model.generate(torch.tensor([[5, 6, 1], [7, 1, 9]]), attention_mask=mask, max_new_tokens=4)
    assert "Every prompt ends with an EOS token" in caplog.text
