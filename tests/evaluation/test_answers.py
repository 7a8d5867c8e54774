"""Answers to held-out prompts, and the loss on held-out examples."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from calm.data.examples import Example, lay_out
from calm.data.tokenizer import train_tokenizer
from calm.evaluation.answers import (
    answer,
    completions_of,
    ends_with_completion,
    exact_match,
    held_out_loss,
    metric_of_answers,
)
from calm.text.decoding import decode_after


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five six seven"] * 9, 300)


@pytest.fixture
def examples(tokenizer):
    pairs = [("one", " two"), ("one two three", " four five six"), ("six", " seven")] * 6
    return [
        Example(*(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair)) for pair in pairs
    ]


def llama(vocab_size):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **ids, initializer_range=0.5)).eval()


def test_exact_match_ignores_leading_and_trailing_whitespace(examples, tokenizer):
    completions = completions_of(examples[:3], tokenizer)
    assert completions == [" two", " four five six", " seven"]
    assert exact_match(["two\n", " four five six", "eight"], completions) == pytest.approx(200 / 3)
    assert exact_match(["Two", "four  five six", ""], completions) == 0


def test_metric_of_answers_with_steps_looks_only_at_the_last_words():
    answers, completions = ["a = 2 .  four five\n", "four five", "five", ""], [" four five"] * 4
    name, metric = metric_of_answers(may_begin_with_steps=True)
    assert (name, metric(answers, completions)) == ("ends_with_completion", 50)
    name, metric = metric_of_answers(may_begin_with_steps=False)
    assert (name, metric(answers, completions)) == ("exact_match", 25)


def test_answer_is_right_if_its_last_words_are_the_completion(examples, tokenizer):
    [two, four_five_six] = examples[:2]
    right = {
        "two": two,
        "b = 5 . two\n": two,
        "four  five\nsix": four_five_six,
        "six four five six": four_five_six,
    }
    wrong = {
        "two .": two,
        "onetwo": two,
        "": two,
        "Two": two,
        "five six": four_five_six,
        "two four five": four_five_six,
    }
    for answers, percent in ((right, 100), (wrong, 0)):
        for text, example in answers.items():
            assert ends_with_completion([text], completions_of([example], tokenizer)) == percent, text


def test_greedy_answers_match_decoding_each_prompt_alone(examples, tokenizer):
    """The reference is the greedy decoding of transformers."""
    model = llama(len(tokenizer))
    answers = answer(model, tokenizer, examples, temperature=0, num_draws=1, seed=0)
    assert len(answers) == len(examples) > 16  # More than one batch.
    longest = max(len(example.completion) for example in examples)
    for example, text in zip(examples, answers, strict=True):
        ids = torch.tensor([example.prompt])
        new = model.generate(ids, max_new_tokens=longest, do_sample=False)[0, len(example.prompt) :]
        assert text == decode_after(tokenizer, example.prompt, new.tolist())


def test_answers_of_a_calm_are_determined_by_the_seed(examples, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    first, again, other = (
        answer(model, tokenizer, examples, temperature=1, num_draws=1, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_no_examples_give_no_answers(tokenizer):
    model = llama(len(tokenizer))
    assert answer(model, tokenizer, [], temperature=0, num_draws=1, seed=0) == []


def test_loss_of_a_token_model_is_the_cross_entropy_of_completions(examples, tokenizer):
    model = llama(len(tokenizer))
    blocks, _ = lay_out(examples, chunk_size=1, block_size=16, pad_token_id=0)
    losses = []
    for example in examples:
        ids = torch.tensor([example.prompt + example.completion])
        logits = model(ids).logits[0, len(example.prompt) - 1 : -1]
        losses += F.cross_entropy(logits, torch.tensor(example.completion), reduction="none").tolist()
    expected = sum(losses) / len(losses)
    assert held_out_loss(model, blocks, len(blocks)) == pytest.approx(expected, rel=1e-4)
    assert held_out_loss(model, blocks, 1) != pytest.approx(expected, rel=1e-4)


def test_loss_of_a_calm_uses_the_same_noise_on_every_call(examples, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    blocks, _ = lay_out(examples, chunk_size=4, block_size=32, pad_token_id=0)
    first = held_out_loss(model, blocks, 2)
    torch.manual_seed(9)
    assert held_out_loss(model, blocks, 2) == first != held_out_loss(model, blocks, 1)
