"""Every shipped recipe is complete, makes a model, and runs for two steps at a shrunken size."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from calm.data.prepared import load_prepared
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer
from calm.errors import InputError
from calm.models.calm import CalmForCausalLM
from calm.models.loading import load_autoencoder
from calm.training.build import model_config, new_language_model
from calm.training.check import check_recipe
from calm.training.finetuning import finetune
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import AutoencoderSettings, Recipe, TrainingSettings
from calm.training.recipe_files import (
    differences,
    read_recipe,
    read_recipe_of,
    with_settings,
    write_recipe,
)
from calm.training.recipe_settings import shipped_recipes
from calm.training.stages import train, train_autoencoder

SHIPPED = [
    "calm_l",
    "calm_m",
    "calm_m_diffusion",
    "calm_m_flow",
    "calm_xl",
    "cpu_tiny",
    "demo",
    "demo_baseline",
    "demo_categorical",
    "demo_diffusion",
    "demo_flow",
    "demo_sequential",
    "draft",
    "laptop",
    "laptop_categorical",
    "laptop_classes",
    "laptop_energy",
    "laptop_quick",
    "one_gpu",
    "transformer_l",
    "transformer_m",
    "transformer_s",
    "uptrain_eight_gpus",
    "uptrain_one_gpu",
]


def test_the_list_is_what_is_shipped():
    assert list(shipped_recipes()) == SHIPPED


def test_every_shipped_recipe_says_what_is_recorded_of_it():
    """One that is changed may change others, which extend it: what each says in full is in a file."""
    recorded = (Path(__file__).parent / "resolved_recipes.jsonl").read_text().splitlines()
    shipped = [(kind, name) for kind in (Recipe, FinetuningRecipe) for name in shipped_recipes(kind)]
    for line, (kind, name) in zip(recorded, shipped, strict=True):
        settings = dataclasses.asdict(read_recipe_of(kind, name))
        assert {"name": name, "settings": settings} == json.loads(line)


def shrink(recipe: Recipe, text: str) -> Recipe:
    """The same recipe with small sizes and two steps."""
    few = {
        "steps": 2,
        "batch_tokens": 64,
        "microbatch_tokens": 32,
        "evaluate_every": 2,
        "evaluation_blocks": 2,
        "compile": False,  # It takes half a minute for each; test_compiled_training does it once.
        "num_workers": 0,
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
            latent_size=32 if recipe.autoencoder.kind == "codes" else 8,
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


def with_small_source(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with a Transformer of three layers in the place of the one that it begins with."""
    if recipe.language_model.init_from is None:
        return recipe
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300)).save_pretrained(folder)
    train_tokenizer(stories(0, 12), 300).save_pretrained(folder)
    layers = {"first_layers": 1, "last_layers": 1}
    cut = {f"language_model.uptraining.{name}": number for name, number in layers.items()}
    return with_settings(recipe, {"language_model.init_from": str(folder), **cut})


@pytest.mark.parametrize("name", SHIPPED)
def test_runs_for_two_steps(name, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(0, 12)))
    recipe = with_small_source(read_recipe(name), tmp_path / "source")
    model = train(shrink(recipe, str(text)), tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert type(loaded) is (CalmForCausalLM if recipe.model == "calm" else LlamaForCausalLM)
    assert getattr(loaded.config, "chunk_size", 1) == recipe.chunk_size
    saved = read_recipe(str(model / "recipe.yaml"))
    assert differences(saved, read_recipe(str(tmp_path / "run/recipe.yaml"))) == []


@pytest.mark.parametrize("name", ["demo_sequential", "demo_categorical"])
@pytest.mark.parametrize("bias_from_text", [True, False])
def test_scores_of_a_new_head_start_from_the_tokens_of_its_text(name, bias_from_text, tmp_path):
    texts = list(stories(0, 12))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = shrink(read_recipe(name), str(tmp_path / "text.jsonl"))
    recipe.language_model.head["bias_from_text"] = bias_from_text
    run = tmp_path / "run"
    train_autoencoder(recipe, run)
    data = load_prepared(run / "data")
    model = new_language_model(recipe, data, load_autoencoder(run / "autoencoder"))
    bias = model.head.scores.bias.detach()
    if bias_from_text:
        counts = torch.zeros(data.vocab_size)
        for tokens in data.train["input_ids"]:
            for token in [*tokens, data.tokenizer.eos_token_id]:
                counts[token] += 1
        assert (counts == 0).any()  # Such a token gets half a count.
        assert_close(bias.exp(), (counts + 0.5) / (counts.sum() + len(counts) / 2), rtol=1e-5, atol=1e-8)
    else:
        assert not bias.any()


def test_a_head_of_a_larger_vocabulary_starts_from_the_text_too():
    """Codes that were made for another tokenizer may know more tokens than the text has."""
    head = tiny_model(4, vocab_size=40, head_config={"head_type": "sequential"}).head
    head.init_from_counts(lambda: torch.tensor([3, 1]))
    assert_close(head.scores.bias.exp(), torch.tensor([3.5, 1.5, *[0.5] * 38]) / 24)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("calm_m", 371),
        ("calm_l", 735),
        ("calm_xl", 1820),
        ("transformer_s", 281),
        ("transformer_m", 465),
        ("transformer_l", 849),
    ],
)
def test_models_of_the_paper_have_the_published_size(name, millions):
    """Parameters beside the 75M of the autoencoder (paper, Llama 3 vocabulary and padding)."""
    config = model_config(read_recipe(name), 128_257)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters == pytest.approx(millions * 1e6, rel=0.01)
    if name.startswith("calm"):
        frozen = sum(p.numel() for p in model.autoencoder.parameters())
        assert frozen == pytest.approx(75e6, rel=0.02)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.split("_")[0] in ("calm", "transformer")])
def test_recipes_of_the_paper_have_its_settings(name):
    """Appendix of the paper: steps, tokens a step, rates, and the autoencoder."""
    recipe = read_recipe(name)
    model = recipe.language_model.training
    assert (model.steps, model.batch_tokens, model.precision) == (250_000, 2**21, "bf16")
    optimizer = model.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adamw", 3e-4, 0.1)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon, optimizer.max_grad_norm) == (
        0.9,
        0.95,
        1e-8,
        1,
    )
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 2000)
    assert recipe.data.context == 2048 * recipe.chunk_size and recipe.data.layout == "packed"
    if recipe.model == "calm":
        autoencoder = recipe.autoencoder
        assert (autoencoder.latent_size, autoencoder.hidden_size, autoencoder.intermediate_size) == (
            128,
            512,
            1280,
        )
        assert (autoencoder.token_dropout, autoencoder.latent_dropout) == (0.15, 0.15)
        assert (autoencoder.kl_weight, autoencoder.kl_floor) == (1e-3, 0.5)
        assert (autoencoder.training.steps, autoencoder.training.batch_tokens) == (30_000, 2**19)
        assert recipe.language_model.head["num_blocks"] == recipe.language_model.num_layers // 4


@pytest.mark.skipif(
    torch.__version__ < "2.12" and not torch.cuda.is_available(),
    reason="the compiler of torch 2.11 writes C++ that does not compile",
)
def test_compiled_training(tmp_path):
    """A compiled language model has the losses of one that is not."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(0, 12)))
    losses = []
    for compiled in (False, True):
        settings = {"language_model.training.compile": compiled, "language_model.training.log_every": 1}
        recipe = with_settings(shrink(read_recipe("cpu_tiny"), str(text)), settings)
        train(recipe, tmp_path / str(compiled))
        history = json.loads((tmp_path / str(compiled) / "history.json").read_text())
        losses.append([entry["loss"] for entry in history["language_model"] if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


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


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"seed": 1.5}, "seed must be a whole number, got '1.5'"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"training": TrainingSettings(steps=8.0)}, "training.steps must be a whole number, got '8.0'"),
        ({"training": TrainingSettings(compile="yes please")}, "training.compile must be "),
    ],
)
def test_a_recipe_that_was_made_in_python_has_its_types_checked(settings, name, tmp_path):
    whole = dict(settings)
    if training := whole.pop("training", None):
        whole["autoencoder"] = AutoencoderSettings(training=training)
    with pytest.raises(InputError, match=f"^recipe: (autoencoder.)?{re.escape(name)}"):
        train(Recipe(**whole), tmp_path / "run")
    with pytest.raises(InputError, match=f"^recipe: {re.escape(name)}"):
        finetune(FinetuningRecipe(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mistakes_are_found_before_any_work():
    with pytest.raises(InputError, match="names no text"):
        check_recipe(read_recipe("demo"))
    recipe = dataclasses.replace(
        read_recipe("demo"), data=dataclasses.replace(read_recipe("demo").data, sources="x")
    )
    check_recipe(recipe)
    bad_steps = dataclasses.replace(recipe.autoencoder.training, steps=0)
    with pytest.raises(InputError, match=r"autoencoder.training.steps must be at least 1 and .*, got 0"):
        check_recipe(
            dataclasses.replace(
                recipe, autoencoder=dataclasses.replace(recipe.autoencoder, training=bad_steps)
            )
        )
    uneven = dataclasses.replace(recipe.autoencoder.training, batch_tokens=2000)
    recipe_of_uneven = dataclasses.replace(
        recipe, autoencoder=dataclasses.replace(recipe.autoencoder, training=uneven)
    )
    with pytest.raises(
        InputError, match=r"autoencoder.training.batch_tokens must be a multiple of 512 .*2000"
    ):
        check_recipe(recipe_of_uneven)
    # A stage that is not trained need not fit.
    check_recipe(dataclasses.replace(recipe_of_uneven, model="autoregressive", chunk_size=1))
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
    if not is_flash_attn_2_available():
        with pytest.raises(
            InputError, match="does not define a valid model: FlashAttention2 has been toggled on"
        ):
            check_recipe(dataclasses.replace(recipe, language_model=flash))
    with pytest.raises(InputError, match="attention to sdpa"):
        check_recipe(dataclasses.replace(recipe, chunk_size=2, language_model=flash))
    with pytest.raises(InputError, match="there is no recipe 'none'"):
        read_recipe("none")
