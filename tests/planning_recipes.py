"""Recipes of toy size, small enough that what is planned can also be built."""

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
    """The planned stages of a small recipe; in names of settings, write __ for a dot."""
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    small = SMALL | (SMALL_AUTOENCODER if recipe in ("demo", "demo_flow") else {})
    return stages_of(with_settings(read_recipe(recipe), small | changes), devices)


def build_network(stage: PlannedStage) -> torch.nn.Module:
    """The network of a stage, with real weights (plans use fake tensors)."""
    auto_class = AutoModel if stage.name == "autoencoder" else AutoModelForCausalLM
    return auto_class.from_config(stage.config).train()
