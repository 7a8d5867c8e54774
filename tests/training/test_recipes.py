"""Every shipped recipe is complete, makes a model, and trains for two steps at a reduced size."""

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
from calm.data.stories import stories, write_stories
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


def test_list_names_every_shipped_recipe():
    assert list(shipped_recipes()) == SHIPPED


def test_shipped_recipes_have_the_recorded_settings():
    """A changed recipe changes those that extend it, so the settings of each are recorded in full."""
    recorded = (Path(__file__).parent / "resolved_recipes.jsonl").read_text().splitlines()
    shipped = [(kind, name) for kind in (Recipe, FinetuningRecipe) for name in shipped_recipes(kind)]
    for line, (kind, name) in zip(recorded, shipped, strict=True):
        settings = dataclasses.asdict(read_recipe_of(kind, name))
        assert {"name": name, "settings": settings} == json.loads(line)


def shrink(recipe: Recipe, text: str) -> Recipe:
    """The same recipe with small sizes and two steps."""
    training_changes = {
        "steps": 2,
        "batch_tokens": 64,
        "microbatch_tokens": 32,
        "evaluate_every": 2,
        "evaluation_blocks": 2,
        "compile": False,  # It takes half a minute; another test does it once.
        "num_workers": 0,
    }
    replace = dataclasses.replace

    def training(stage):
        return replace(
            stage.training, **training_changes, optimizer=replace(stage.training.optimizer, warmup_steps=1)
        )

    head = dict(recipe.language_model.head) | {"num_blocks": 1}
    small = {"energy": {"noise_size": 4}, "diffusion": {"num_steps": 4}}
    head |= small.get(head["head_type"], {})
    return replace(
        recipe,
        data=replace(
            recipe.data, sources=text, vocab_size=300, context=32, validation_fraction=0.2, num_proc=1
        ),
        autoencoder=replace(
            recipe.autoencoder,
            latent_size=32 if recipe.autoencoder.kind == "codes" else 8,
            hidden_size=16,
            intermediate_size=16,
            training=training(recipe.autoencoder),
        ),
        language_model=replace(
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
    """The same recipe; if it starts from a Transformer, then from one of three layers."""
    if recipe.language_model.init_from is None:
        return recipe
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300)).save_pretrained(folder)
    train_tokenizer(stories(0, 12), 300).save_pretrained(folder)
    layers = {"first_layers": 1, "last_layers": 1}
    cut = {f"language_model.uptraining.{name}": number for name, number in layers.items()}
    return with_settings(recipe, {"language_model.init_from": str(folder), **cut})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_trains_for_two_steps(name, tmp_path):
    text = tmp_path / "text.jsonl"
    write_stories(text, 0, 12)
    recipe = with_small_source(read_recipe(name), tmp_path / "source")
    model = train(shrink(recipe, str(text)), tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert type(loaded) is (CalmForCausalLM if recipe.model == "calm" else LlamaForCausalLM)
    assert getattr(loaded.config, "chunk_size", 1) == recipe.chunk_size
    saved = read_recipe(str(model / "recipe.yaml"))
    assert differences(saved, read_recipe(str(tmp_path / "run/recipe.yaml"))) == []


@pytest.mark.parametrize("name", ["demo_sequential", "demo_categorical"])
@pytest.mark.parametrize("bias_from_text", [True, False])
def test_new_head_starts_with_the_token_frequencies_of_its_text(name, bias_from_text, tmp_path):
    write_stories(tmp_path / "text.jsonl", 0, 12)
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
        assert (counts == 0).any()  # Tokens that do not occur get half a count.
        assert_close(bias.exp(), (counts + 0.5) / (counts.sum() + len(counts) / 2), rtol=1e-5, atol=1e-8)
    else:
        assert not bias.any()


def test_token_counts_may_be_fewer_than_the_vocabulary_of_a_head():
    """Codes trained with another tokenizer may have more tokens than the text; each gets half a count."""
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
def test_compiled_training_has_the_same_losses(tmp_path):
    """As training that is not compiled."""
    text = tmp_path / "text.jsonl"
    write_stories(text, 0, 12)
    losses = []
    for compiled in (False, True):
        settings = {"language_model.training.compile": compiled, "language_model.training.log_every": 1}
        recipe = with_settings(shrink(read_recipe("cpu_tiny"), str(text)), settings)
        train(recipe, tmp_path / str(compiled))
        history = json.loads((tmp_path / str(compiled) / "history.json").read_text())
        losses.append([entry["loss"] for entry in history["language_model"] if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_recipe_survives_writing_and_reading(tmp_path):
    recipe = read_recipe("demo")
    write_recipe(recipe, tmp_path / "copy.yaml")
    assert read_recipe(str(tmp_path / "copy.yaml")) == recipe
    other = dataclasses.replace(recipe, seed=9, data=dataclasses.replace(recipe.data, context=64))
    assert differences(recipe, other) == ["data.context", "seed"]


def test_tokens_per_step_do_not_depend_on_the_number_of_processes():
    settings = TrainingSettings(batch_tokens=24 * 64, microbatch_tokens=5 * 64 + 3)
    for processes in (1, 2, 3, 4, 6, 8, 12, 24):
        per_microbatch, microbatches = settings.batches(64, processes)
        assert per_microbatch * microbatches * processes == 24 and per_microbatch <= 5
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
    ("settings", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number, got '1.5'"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"training": TrainingSettings(steps=8.0)}, "training.steps must be a whole number, got '8.0'"),
        ({"training": TrainingSettings(compile="yes please")}, "training.compile must be "),
    ],
)
def test_types_are_checked_in_recipes_made_in_python(settings, message, tmp_path):
    train_settings = dict(settings)
    if training := train_settings.pop("training", None):
        train_settings["autoencoder"] = AutoencoderSettings(training=training)
    with pytest.raises(InputError, match=f"^recipe: (autoencoder.)?{re.escape(message)}"):
        train(Recipe(**train_settings), tmp_path / "run")
    with pytest.raises(InputError, match=f"^recipe: {re.escape(message)}"):
        finetune(FinetuningRecipe(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def check_changed(recipe: Recipe, **changes) -> None:
    check_recipe(dataclasses.replace(recipe, **changes))


@pytest.fixture
def demo() -> Recipe:
    """A recipe without mistakes."""
    recipe = read_recipe("demo")
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources="x"))


def test_recipe_without_text_and_unknown_recipe_are_errors(demo):
    check_recipe(demo)
    with pytest.raises(InputError, match="names no text"):
        check_recipe(read_recipe("demo"))
    with pytest.raises(InputError, match="there is no recipe 'none'"):
        read_recipe("none")


def test_training_settings_are_checked_for_stages_that_are_trained(demo):
    def with_training(**changes):
        training = dataclasses.replace(demo.autoencoder.training, **changes)
        return dataclasses.replace(demo.autoencoder, training=training)

    with pytest.raises(InputError, match=r"autoencoder.training.steps must be at least 1 and .*, got 0"):
        check_changed(demo, autoencoder=with_training(steps=0))
    uneven = with_training(batch_tokens=2000)
    with pytest.raises(
        InputError, match=r"autoencoder.training.batch_tokens must be a multiple of 512 .*2000"
    ):
        check_changed(demo, autoencoder=uneven)
    # A baseline has no autoencoder to train.
    check_changed(demo, autoencoder=uneven, model="autoregressive", chunk_size=1)


def test_chunk_size_and_context_must_suit_the_model(demo):
    with pytest.raises(InputError, match="set chunk_size to 1, not 4"):
        check_changed(demo, model="autoregressive")
    # Windows of four tokens are scored, whatever the chunk size.
    for changes, context in (({"model": "autoregressive", "chunk_size": 1}, 511), ({"chunk_size": 2}, 510)):
        data = dataclasses.replace(demo.data, context=context)
        with pytest.raises(InputError, match="multiple of the chunk size 4"):
            check_changed(demo, data=data, **changes)


def test_flash_attention_must_be_available_and_suit_the_chunk_size(demo):
    flash = dataclasses.replace(demo.language_model, attention="flash_attention_2")
    if not is_flash_attn_2_available():
        with pytest.raises(
            InputError, match="does not define a valid model: FlashAttention2 has been toggled on"
        ):
            check_changed(demo, language_model=flash)
    with pytest.raises(InputError, match="attention to sdpa"):
        check_changed(demo, chunk_size=2, language_model=flash)
