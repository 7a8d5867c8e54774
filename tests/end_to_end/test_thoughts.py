"""Thoughts carry what pauses cannot: where a path of three steps ends."""

import json

import pytest
from transformers import set_seed

from calm.data.tasks import write_items
from calm.data.tokenizer import train_tokenizer
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.training.build import autoencoder_config, language_model_config, special_tokens_of
from calm.training.finetuning import finetune
from calm.training.finetuning_recipe import AnswerSettings, ExampleSettings, FinetuningRecipe, ThoughtSettings
from calm.training.recipe import (
    AutoencoderSettings,
    LanguageModelSettings,
    OptimizerSettings,
    Recipe,
    TrainingSettings,
)

ASKED = 100


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A model of chunks of four that knows nothing, and questions."""
    folder = tmp_path_factory.mktemp("room")
    write_items(folder / "path.jsonl", "path", 3, 0, 8000, False)
    write_items(folder / "held_out.jsonl", "path", 3, 0, ASKED, True)
    lines = (folder / "path.jsonl").read_text().splitlines()[:500]
    texts = (" ".join([json.loads(line)["prompt"], *json.loads(line)["steps"]]) for line in lines)
    tokenizer = train_tokenizer(texts, 330)
    settings = LanguageModelSettings(
        hidden_size=64,
        intermediate_size=160,
        num_layers=2,
        num_heads=4,
        embedding_initializer_range=0.5,
        head={"head_type": "sequential", "rank": 64},
    )
    recipe = Recipe(language_model=settings, autoencoder=AutoencoderSettings(kind="codes", latent_size=64))
    set_seed(1)
    special = special_tokens_of(tokenizer)
    autoencoder = CalmAutoencoder(autoencoder_config(recipe, len(tokenizer), special))
    model = CalmForCausalLM(language_model_config(recipe, autoencoder.config, special))
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    model.save_pretrained(folder / "new")
    tokenizer.save_pretrained(folder / "new")
    return folder


def share_of_right_answers(room, mode):
    recipe = FinetuningRecipe(
        seed=2,
        model=str(room / "new"),
        examples=ExampleSettings(
            sources=str(room / "path.jsonl"), validation_sources=str(room / "held_out.jsonl"), context=96
        ),
        thoughts=ThoughtSettings(mode=mode, stages=3, first_stage=3, tell=True),
        training=TrainingSettings(
            steps=450,
            batch_tokens=64 * 96,
            evaluate_every=0,
            save_every=0,
            optimizer=OptimizerSettings(
                name="muon", learning_rate=2e-2, adamw_learning_rate=5e-3, warmup_steps=50, schedule="linear"
            ),
        ),
        answers=AnswerSettings(number=ASKED),
    )
    finetune(recipe, room / mode)
    answers = [json.loads(line) for line in (room / mode / "answers.jsonl").read_text().splitlines()]
    return sum(one["after"].split() == one["completion"].split() for one in answers) / ASKED


def test_thoughts_beat_pauses(room):
    """With the same labels, items, steps and seed: beyond three standard errors (here it is about 0.9)."""
    thoughts, pauses = (share_of_right_answers(room, mode) for mode in ("state", "pause"))
    error = ((thoughts * (1 - thoughts) + pauses * (1 - pauses)) / ASKED) ** 0.5
    assert thoughts - pauses > 3 * error, (thoughts, pauses)
    assert thoughts > 0.6 > 0.4 > pauses
