"""Recipes of toy size, commands that must fail, and runs that are interrupted."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from calm.cli import main
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer
from calm.training.recipe import (
    AutoencoderSettings,
    DataSettings,
    LanguageModelSettings,
    OptimizerSettings,
    Recipe,
    TrainingSettings,
)
from calm.training.recipe_files import write_recipe
from calm.training.trainer import ChunkTrainer

TOY = """
data: {vocab_size: 300, context: 64, validation_fraction: 0.1, num_proc: 1}
autoencoder:
  latent_size: 8
  hidden_size: 24
  intermediate_size: 32
  training: {steps: 30, batch_tokens: 128, evaluate_every: 15, evaluation_blocks: 4}
language_model:
  hidden_size: 32
  intermediate_size: 48
  num_layers: 2
  num_heads: 2
  head: {head_type: energy, noise_size: 8, num_blocks: 1, num_posterior_draws: 0}
  training: {steps: 20, batch_tokens: 128, evaluate_every: 10, evaluation_blocks: 4}
"""


def toy_recipe(text: Path, optimizer: str = "muon", **changes) -> Recipe:
    """A recipe that trains on a text within a second."""
    training = TrainingSettings(
        steps=8,
        batch_tokens=64,
        evaluate_every=3,
        evaluation_blocks=4,
        save_every=3,
        optimizer=OptimizerSettings(name=optimizer, warmup_steps=2, schedule="warmup_stable_decay"),
    )
    return Recipe(
        seed=3,
        data=DataSettings(sources=str(text), vocab_size=300, context=32, validation_fraction=0.2, num_proc=1),
        autoencoder=AutoencoderSettings(
            latent_size=8, hidden_size=16, intermediate_size=24, training=training
        ),
        language_model=LanguageModelSettings(
            hidden_size=16,
            intermediate_size=24,
            num_layers=2,
            num_heads=2,
            head={"head_type": "energy", "noise_size": 4, "num_blocks": 1, "num_posterior_draws": 4},
            training=training,
        ),
        **changes,
    )


def failure(capsys, *arguments: object) -> str:
    """Run a command that must fail with exit code 2; return its error message, a single line."""
    with pytest.raises(SystemExit) as raised:
        main([str(argument) for argument in arguments])
    assert raised.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calm: error:")]
    assert len(lines) == 1
    return lines[0]


class InterruptAt(TrainerCallback):
    """Raises KeyboardInterrupt at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupt(monkeypatch, stage: str, step: int) -> None:
    """Interrupt the training of a stage at a step."""
    original = ChunkTrainer.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if Path(self.args.output_dir).name == stage:
            self.add_callback(InterruptAt(step))

    monkeypatch.setattr(ChunkTrainer, "__init__", patched)


def killed_and_resumed(recipe: Recipe, output: Path, monkeypatch) -> Path:
    """Train from the command line, interrupt the language model, and resume; returns the model's folder."""
    file = output.with_name("recipe.yaml")
    write_recipe(recipe, file)
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 5)
        with pytest.raises(SystemExit):
            main(["train", "--recipe", str(file), "--output", str(output)])
    main(["train", "--resume", "--output", str(output)])
    return output / "model"


def toy_source(folder: Path, vocab_size: int | None = None, seed: int = 0) -> Path:
    """Write a text, and a Transformer of four layers with its tokenizer; returns the Transformer's folder.

    Args:
        folder: The folder for text.jsonl and source/.
        vocab_size: Rows of the embedding, if there are more than tokens.
        seed: Seed of the weights.
    """
    texts = list(stories(0, 12))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in texts))
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    return folder / "source"
