"""What a run with thoughts makes of examples at each stage: rows, losses, the length of answers."""

import pytest
import torch
from tiny import tiny_llama, tiny_model
from transformers import PreTrainedTokenizerBase

from calm.core.chunks import IGNORED_LABEL
from calm.data.examples import Example
from calm.data.tokenizer import train_tokenizer
from calm.models.thoughts import Thoughts
from calm.training.finetuning_recipe import ExampleSettings, FinetuningRecipe, ThoughtSettings
from calm.training.recipe import TrainingSettings
from calm.training.thinking import ThoughtTraining, thinking_of

# With prompts and steps of several lengths, and more examples than are scored at once.
EXAMPLES = [
    Example([2, *range(3, 4 + number % 5)], [30, 1], ([10, 11, 12][: 1 + number % 3], [20, 21]))
    for number in range(20)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a b = 1 . 4"] * 20, 300)


def model_of(kind, tokenizer):
    if kind == "plain":
        return tiny_llama(vocab_size=len(tokenizer))
    return tiny_model(2, vocab_size=len(tokenizer), head_config={"head_type": kind}).double()


def thinking_for(model, tokenizer, context=64, **thoughts) -> ThoughtTraining:
    settings = {"mode": "state", "stages": 2, "steps_per_stage": 3}
    recipe = FinetuningRecipe(
        examples=ExampleSettings(context=context),
        thoughts=ThoughtSettings(**settings | thoughts),
        training=TrainingSettings(steps=9),
    )
    thinking = thinking_of(recipe, model, tokenizer)
    assert thinking is not None
    return thinking


@pytest.mark.parametrize(("mode", "supervised"), [("state", True), ("pause", True), ("state", False)])
def test_supervised_thoughts_are_labelled_with_their_steps(mode, supervised, tokenizer):
    """And `is_thought` marks the chunks of thoughts, and no others."""
    model = model_of("sequential", tokenizer)
    thinking = thinking_for(model, tokenizer, mode=mode, supervised=supervised, per_step=2)
    for example in EXAMPLES[:4]:
        for stage in thinking.curriculum.stages:
            batch = thinking.collate([thinking.row(example, stage)])
            labels = batch["labels"].view(-1, 2).tolist()
            first = -(-len(example.prompt) // 2) + 1  # After the marker.
            expected = []
            for step in example.steps[: stage.left_out]:
                padded = step + [IGNORED_LABEL] * (4 - len(step))
                expected += [padded[:2], padded[2:]]
            ignored = [[IGNORED_LABEL] * 2] * (2 * stage.left_out)
            assert labels[first : first + len(expected)] == (expected if supervised else ignored)
            is_thought = batch["is_thought"][0].tolist() if "is_thought" in batch else []
            thought_chunks = [index for index, is_one in enumerate(is_thought) if is_one]
            assert thought_chunks == (list(range(first, first + len(ignored))) if mode == "state" else [])


@pytest.mark.parametrize("kind", ["plain", "sequential"])
def test_the_loss_is_a_mean_over_all_targets_at_the_current_stage(kind, tokenizer):
    model = model_of(kind, tokenizer)
    thinking, losses = thinking_for(model, tokenizer), set()
    for stage in thinking.curriculum.stages:
        thinking.enter_stage(model, stage)
        total, count = 0.0, 0
        for example in EXAMPLES:
            batch = thinking.collate([thinking.row(example, stage)])
            batch.pop("block_numbers", None)
            sequences = (*example.steps[stage.left_out :], example.completion)
            chunk_size = 1 if kind == "plain" else 2
            targets = sum(-(-len(tokens) // chunk_size) for tokens in sequences)
            total, count = total + float(model(**batch).loss.detach()) * targets, count + targets
        losses.add(loss := thinking.loss(model, EXAMPLES))
        assert loss == pytest.approx(total / count, rel=1e-5)
    assert len(losses) == 3


def test_the_loss_has_the_same_noise_each_time(tokenizer):
    model = model_of("energy", tokenizer)
    thinking = thinking_for(model, tokenizer)
    first = thinking.loss(model, EXAMPLES)
    torch.manual_seed(9)
    assert thinking.loss(model, EXAMPLES) == first


@pytest.mark.parametrize(("kind", "expected"), [("plain", [7, 4, 2]), ("sequential", [8, 4, 2])])
def test_longest_answer_has_the_steps_that_are_still_written(kind, expected, tokenizer):
    model = model_of(kind, tokenizer)
    thinking, actual = thinking_for(model, tokenizer), []
    for stage in thinking.curriculum.stages:
        thinking.enter_stage(model, stage)
        actual.append(thinking.longest_answer(EXAMPLES))
    assert actual == expected and thinking.longest_answer([]) == 0


def test_a_prompt_counts_as_shortened_if_it_is_at_any_stage(tokenizer):
    """Here the last stage leaves the least room: 2 markers, 10 thoughts and 2 tokens of the completion."""
    model = model_of("plain", tokenizer)
    thinking = thinking_for(model, tokenizer, context=20, per_step=5)
    too_long = [example for example in EXAMPLES if len(example.prompt) > 20 - 2 - 10 - 2]
    assert thinking.num_shortened(EXAMPLES) == len(too_long) == 0
    thinking = thinking_for(model, tokenizer, context=18, per_step=5)
    too_long = [example for example in EXAMPLES if len(example.prompt) > 18 - 2 - 10 - 2]
    assert thinking.num_shortened(EXAMPLES) == len(too_long) == 8


def test_markers_are_the_tokens_of_the_recipe_in_its_order(tokenizer):
    model = model_of("plain", tokenizer)
    thinking = thinking_for(model, tokenizer, markers=["<|eos|>", "<|bos|>"])
    assert thinking.thoughts == Thoughts(0, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert thinking_for(model, tokenizer).thoughts == Thoughts(
        0, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
