"""The token-level Llama, against the class of transformers that it extends."""

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
def test_losses_and_gradients_match_the_parent(model, arguments):
    assert_close(loss_and_gradients(model, **arguments), loss_and_gradients(parent_of(model), **arguments))


def test_batch_without_targets_has_no_loss(model):
    loss, *gradients = loss_and_gradients(model, labels=torch.full_like(IDS, -100))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_only_training_skips_the_logits(model):
    assert model(IDS, labels=LABELS).logits is None
    actual, expected = (network.eval()(IDS, labels=LABELS) for network in (model, parent_of(model)))
    assert_close((actual.loss, actual.logits), (expected.loss, expected.logits))
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
def test_requested_outputs_match_the_parent(model, arguments):
    actual, expected = (network(IDS, labels=LABELS, **arguments) for network in (model, parent_of(model)))
    assert type(actual) is type(expected) and len(actual) == len(expected)
    values = (output if isinstance(output, tuple) else output.values() for output in (actual, expected))
    for actual_value, expected_value in zip(*values, strict=True):
        if not hasattr(actual_value, "get_seq_length"):  # The cache cannot be compared.
            assert_close(actual_value, expected_value)


def test_configuration_can_request_outputs(model):
    model.config.output_hidden_states = True
    assert len(model(IDS, labels=LABELS).hidden_states) == 3


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "shift_labels", "return_dict"])
def test_arguments_that_are_none_request_nothing(name, model):
    assert model(IDS, labels=LABELS, **{name: None}).logits is None


def test_forward_has_the_arguments_that_the_trainer_passes(model):
    """transformers' Trainer drops the columns of a data set that are no arguments of `forward`."""
    assert {"input_ids", "attention_mask", "position_ids", "labels"} <= set(
        inspect.signature(model.forward).parameters
    )


def test_saving_over_another_model_leaves_an_intact_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    write_checksums(tmp_path)  # As a run does.
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    check_intact(tmp_path)


def test_saved_folder_loads_as_a_llama_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert_close(loaded.state_dict(), dict(model.state_dict()))
