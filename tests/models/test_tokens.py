"""The model of tokens against the one of transformers that it is."""

import inspect
import json

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from calm.models.tokens import LlamaForCausalLM
from calm.storage.checksums import check_intact, write_checksums

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))
LABELS = IDS.masked_fill(torch.arange(12) % 5 == 2, -100)
POSITIONS = torch.tensor([*range(7), *range(5)]).expand(3, -1)  # Two documents.


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES)).train()


def parent_of(model: LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    parent = transformers.LlamaForCausalLM(model.config).train()
    parent.load_state_dict(model.state_dict())
    return parent


def loss_and_gradients(model, **arguments) -> list[torch.Tensor]:
    model.zero_grad()
    batch = {"input_ids": IDS, "labels": LABELS, "position_ids": POSITIONS, "use_cache": False}
    loss = model(**batch | arguments).loss
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize(
    "arguments", [{}, {"num_items_in_batch": torch.tensor(50)}, {"num_items_in_batch": 7}, {"labels": IDS}]
)
def test_it_learns_what_its_parent_learns(model, arguments):
    assert_close(loss_and_gradients(model, **arguments), loss_and_gradients(parent_of(model), **arguments))


def test_a_batch_without_targets_has_no_loss(model):
    loss, *gradients = loss_and_gradients(model, labels=torch.full_like(IDS, -100))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_training_alone_does_without_scores(model):
    assert model(IDS, labels=LABELS).logits is None
    found, expected = (each.eval()(IDS, labels=LABELS) for each in (model, parent_of(model)))
    assert_close((found.loss, found.logits), (expected.loss, expected.logits))
    assert_close(model.train()(IDS).logits, expected.logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"logits_to_keep": 12},
        {"logits_to_keep": torch.arange(12)},
        {"shift_labels": LABELS},
        {"shift_labels": LABELS, "num_items_in_batch": 7},
    ],
)
def test_whoever_asks_for_more_than_a_loss_gets_it(model, arguments):
    found, expected = (each(IDS, labels=LABELS, **arguments) for each in (model, parent_of(model)))
    assert type(found) is type(expected) and len(found) == len(expected)
    values = (each if isinstance(each, tuple) else each.values() for each in (found, expected))
    for one, other in zip(*values, strict=True):
        if not hasattr(one, "get_seq_length"):  # The cache, which has no values to compare.
            assert_close(one, other)


def test_more_may_be_asked_for_by_the_configuration(model):
    model.config.output_hidden_states = True
    assert len(model(IDS, labels=LABELS).hidden_states) == 3


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "shift_labels", "return_dict"])
def test_what_wrappers_leave_open_asks_for_nothing(name, model):
    assert model(IDS, labels=LABELS, **{name: None}).logits is None


def test_the_trainer_finds_what_it_hands_over(model):
    """It drops the columns of a data set that no argument is named after."""
    assert {"input_ids", "attention_mask", "position_ids", "labels"} <= set(
        inspect.signature(model.forward).parameters
    )


def test_it_is_saved_over_another(model, tmp_path):
    model.save_pretrained(tmp_path)
    write_checksums(tmp_path)  # As a run does.
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    check_intact(tmp_path)


def test_its_folder_is_one_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(read) is transformers.LlamaForCausalLM
    assert_close(read.state_dict(), dict(model.state_dict()))
