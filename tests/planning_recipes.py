"""Recipes of toy size that can be planned and really built."""

import torch
from transformers import AutoModel, AutoModelForCausalLM

from calm.planning.stages import PlannedStage, stages_of
from calm.training.recipe_files import read_recipe, with_settings

SMALL = {
    "data.context": 64,
    "data.vocab_size": 300,
    "language_model.hidden_size": 64,
    "language_model.intermediate_size": 96,
    "language_model.training.batch_tokens": 512,
}
SMALL_AUTOENCODER = {
    "autoencoder.hidden_size": 48,
    "autoencoder.intermediate_size": 64,
    "autoencoder.training.batch_tokens": 512,
}


def stages(recipe: str = "demo", devices: int = 1, **settings: object) -> list[PlannedStage]:
    """The stages of a small recipe; double underscores stand for dots in the names of settings."""
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    own = SMALL | (SMALL_AUTOENCODER if recipe in ("demo", "demo_flow") else {})
    return stages_of(with_settings(read_recipe(recipe), own | changes), devices)


def really(stage: PlannedStage) -> torch.nn.Module:
    """The network of a stage, with memory."""
    kind = AutoModel if stage.name == "autoencoder" else AutoModelForCausalLM
    return kind.from_config(stage.config).train()
