"""Every shipped recipe is complete, makes a model, and runs for two steps at a shrunken size."""

import dataclasses
import json

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from calm.data.stories import stories
from calm.errors import InputError
from calm.models.calm import CalmForCausalLM
from calm.training.configurations import autoencoder_config, check_recipe, language_model_config
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.recipe_files import differences, read_recipe, shipped_recipes, write_recipe
from calm.training.stages import train

SHIPPED = ["calm_m", "demo", "demo_baseline", "demo_diffusion", "demo_flow", "laptop"]


def test_the_list_is_what_is_shipped():
    assert list(shipped_recipes()) == SHIPPED


def shrink(recipe: Recipe, text: str) -> Recipe:
    """The same recipe with small sizes and two steps."""
    few = {
        "steps": 2,
        "batch_tokens": 64,
        "microbatch_tokens": 32,
        "evaluate_every": 2,
        "evaluation_blocks": 2,
    }
    changed = dataclasses.replace

    def training(stage):
        return changed(stage.training, **few, optimizer=changed(stage.training.optimizer, warmup_steps=1))

    head = dict(recipe.language_model.head) | {"num_blocks": 1}
    small = {"energy": {"noise_size": 4}, "diffusion": {"num_steps": 4}}
    head |= small.get(head["head_type"], {})
    return changed(
        recipe,
        data=changed(
            recipe.data, sources=text, vocab_size=300, context=32, validation_fraction=0.2, num_proc=1
        ),
        autoencoder=changed(
            recipe.autoencoder,
            latent_size=8,
            hidden_size=16,
            intermediate_size=16,
            training=training(recipe.autoencoder),
        ),
        language_model=changed(
            recipe.language_model,
            hidden_size=16,
            intermediate_size=16,
            num_layers=2,
            num_heads=2,
            head=head,
            training=training(recipe.language_model),
        ),
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_runs_for_two_steps(name, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(0, 12)))
    recipe = read_recipe(name)
    model = train(shrink(recipe, str(text)), tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert type(loaded) is (CalmForCausalLM if recipe.model == "calm" else LlamaForCausalLM)
    assert getattr(loaded.config, "chunk_size", 1) == recipe.chunk_size
    saved = read_recipe(str(model / "recipe.yaml"))
    assert differences(saved, read_recipe(str(tmp_path / "run/recipe.yaml"))) == []


def test_calm_m_has_the_published_size():
    """371M parameters beside the 75M of the autoencoder (paper, Llama 3 vocabulary and padding)."""
    import torch

    recipe = read_recipe("calm_m")
    autoencoder = autoencoder_config(recipe, 128_257, {})
    config = language_model_config(recipe, autoencoder, {})
    with torch.device("meta"):
        model = CalmForCausalLM(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.autoencoder.parameters())
    assert trained == pytest.approx(371e6, rel=0.01)
    assert frozen == pytest.approx(75e6, rel=0.02)


def test_round_trip(tmp_path):
    recipe = read_recipe("demo")
    write_recipe(recipe, tmp_path / "copy.yaml")
    assert read_recipe(str(tmp_path / "copy.yaml")) == recipe
    other = dataclasses.replace(recipe, seed=9, data=dataclasses.replace(recipe.data, context=64))
    assert differences(recipe, other) == ["data.context", "seed"]


def test_a_step_has_as_many_tokens_on_any_number_of_processes():
    settings = TrainingSettings(batch_tokens=24 * 64, microbatch_tokens=5 * 64 + 3)
    for processes in (1, 2, 3, 4, 6, 8, 12, 24):
        at_once, times = settings.batches(64, processes)
        assert at_once * times * processes == 24 and at_once <= 5
    assert settings.batches(64) == (4, 6)
    assert TrainingSettings(batch_tokens=512).batches(64, 2) == (4, 1)
    for processes in (5, 48):
        with pytest.raises(
            InputError, match=f"multiple of {64 * processes} .*{processes} processes.*got 1536"
        ):
            settings.batches(64, processes)
    with pytest.raises(InputError, match="at least the context of 512 tokens, got 323"):
        dataclasses.replace(settings, batch_tokens=1024).batches(512)


def test_mistakes_are_found_before_any_work():
    with pytest.raises(InputError, match="names no text"):
        check_recipe(read_recipe("demo"))
    recipe = dataclasses.replace(
        read_recipe("demo"), data=dataclasses.replace(read_recipe("demo").data, sources="x")
    )
    check_recipe(recipe)
    bad_steps = dataclasses.replace(recipe.autoencoder.training, steps=0)
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        check_recipe(
            dataclasses.replace(
                recipe, autoencoder=dataclasses.replace(recipe.autoencoder, training=bad_steps)
            )
        )
    with pytest.raises(InputError, match="set chunk_size to 1, not 4"):
        check_recipe(dataclasses.replace(recipe, model="autoregressive"))
    with pytest.raises(InputError, match="multiple of the chunk size 4"):
        odd = dataclasses.replace(recipe.data, context=511)
        check_recipe(dataclasses.replace(recipe, model="autoregressive", chunk_size=1, data=odd))
    with pytest.raises(InputError, match="multiple of the chunk size 4"):
        check_recipe(
            dataclasses.replace(recipe, chunk_size=2, data=dataclasses.replace(recipe.data, context=510))
        )
    flash = dataclasses.replace(recipe.language_model, attention="flash_attention_2")
    check_recipe(dataclasses.replace(recipe, language_model=flash))
    with pytest.raises(InputError, match="attention to sdpa"):
        check_recipe(dataclasses.replace(recipe, chunk_size=2, language_model=flash))
    with pytest.raises(InputError, match="there is no recipe 'none'"):
        read_recipe("none")
