"""From a recipe to the networks that it trains, on fake tensors."""

import pytest
import torch
from planning_recipes import build_network, stages
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig

from calm.errors import InputError
from calm.planning.stages import stages_of
from calm.training.finetuning_recipe import FinetuningRecipe, LoraSettings
from calm.training.recipe_files import read_recipe, read_recipe_of, with_settings
from calm.training.recipe_settings import shipped_recipes


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("demo", ["autoencoder", "language model"]),
        ("demo_sequential", ["language model"]),
        ("demo_baseline", ["language model"]),
    ],
)
def test_stages_are_those_of_training(recipe, names):
    planned = stages(recipe)
    assert [stage.name for stage in planned] == names
    for stage in planned:
        network = build_network(stage)
        assert [(name, p.shape, p.requires_grad) for name, p in stage.network.named_parameters()] == [
            (name, p.shape, p.requires_grad) for name, p in network.named_parameters()
        ]
        assert all(isinstance(tensor, FakeTensor) for tensor in stage.network.state_dict().values())


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_every_shipped_recipe_can_be_planned(recipe, tmp_path):
    LlamaConfig(num_hidden_layers=9).save_pretrained(tmp_path)
    read = read_recipe(recipe)
    source = {} if read.language_model.init_from is None else {"language_model.init_from": str(tmp_path)}
    assert stages_of(with_settings(read, source))


def test_fine_tuning_trains_all_weights_or_only_adapters():
    recipe = read_recipe_of(FinetuningRecipe, "full")
    recipe.model = "stories"
    [full] = stages_of(recipe)
    recipe.lora = LoraSettings(rank=4)
    [adapters] = stages_of(recipe)
    counts = [
        sum(p.numel() for p in stage.network.parameters() if p.requires_grad) for stage in (full, adapters)
    ]
    assert 0 < counts[1] < counts[0] / 5 and adapters.adapted is not None


def test_planned_batch_can_be_passed_to_a_real_network():
    """Its loss is a finite number."""
    for stage in stages():
        network = build_network(stage)
        torch.manual_seed(0)
        loss = network(**stage.batch(2)).loss
        assert loss.isfinite() and loss.ndim == 0
        with stage.fakes:
            assert set(stage.batch(2)) == set(stage.batch(3))


@pytest.mark.parametrize(
    ("settings", "devices", "message"),
    [
        ({}, 3, r"training.batch_tokens must be a multiple of 192 \(blocks of 64 tokens x 3 processes\)"),
        (
            {"language_model.training.microbatch_tokens": 32},
            1,
            "microbatch_tokens must be at least the context",
        ),
        ({"data.context": 63}, 1, "multiple of the chunk size 4"),
        ({"language_model.num_layers": -1}, 1, "num_layers must be at least 1"),
        ({"language_model.num_heads": 7}, 1, "does not define a valid model"),
        ({"language_model.training.optimizer.name": "nadamn"}, 1, "there is no optimizer 'nadamn'"),
        ({"model": "autoregressive"}, 1, "set chunk_size to 1"),
        ({"data.tokenizer": "there/is/none"}, 1, "pass --vocab_size"),
        (
            {"language_model.sharded": True, "language_model.training.compile": True},
            1,
            "cannot be compiled yet",
        ),
    ],
)
def test_mistakes_are_refused_as_in_training(settings, devices, message):
    with pytest.raises(InputError, match=message):
        stages(devices=devices, **settings)


def test_attention_of_a_missing_package_can_be_planned():
    recipe = with_settings(read_recipe("demo"), {"language_model.attention": "flash_attention_2"})
    assert stages_of(recipe)[-1].network.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("requested", "planned"), [("auto", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_the_precision_is_what_a_gpu_would_get(requested, planned):
    settings = {f"{part}__training__precision": requested for part in ("autoencoder", "language_model")}
    assert [stage.settings.precision for stage in stages(**settings)] == [planned, planned]


def test_fine_tuning_needs_a_model():
    with pytest.raises(InputError, match="names no model"):
        stages_of(FinetuningRecipe())
    with pytest.raises(InputError, match="nowhere"):
        stages_of(FinetuningRecipe(model="nowhere/at_all"))
