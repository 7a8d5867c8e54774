"""CALM: language models that predict one vector for a chunk of several tokens (arXiv 2510.27688).

`import calm` registers the models with the Auto classes of transformers. The console script `calm` is the
exception: `calm_command` sets a flag before it imports the package, and the models are registered when
`calm.models.loading` is imported to open one.
"""

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.core.brier import brier_lm, brier_scores
    from calm.core.energy import energy_loss
    from calm.core.gaussian import DiagonalGaussian
    from calm.core.samplers import ExactSampler, HeadSampler, PoolSampler
    from calm.core.temperature import sample_exact, sample_from_pool
    from calm.data.chunking import BlockSettings, make_blocks
    from calm.data.formats import register_format
    from calm.data.prepare import prepare
    from calm.data.prepared import load_prepared
    from calm.data.tokenizer import load_tokenizer, train_tokenizer
    from calm.evaluation.held_out import score_model
    from calm.models.autoencoder import CalmAutoencoder
    from calm.models.calm import CalmForCausalLM
    from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
    from calm.models.generation.sampler_registry import register_sampler, sampler_from
    from calm.models.heads import GenerativeHead, HeadConfig, LatentHead, register_head
    from calm.models.loading import (
        load_autoencoder,
        load_language_model_and_tokenizer,
        load_model_and_tokenizer,
    )
    from calm.texts import continue_texts
    from calm.training.blocks import block_settings
    from calm.training.finetuning import finetune
    from calm.training.finetuning_recipe import FinetuningRecipe
    from calm.training.optimizers import register_optimizer
    from calm.training.recipe import Recipe
    from calm.training.recipe_files import read_recipe, with_settings
    from calm.training.stages import train

__version__ = "0.1.0"

# Public name -> the module that defines it.
_MODULES = {
    "BlockSettings": "calm.data.chunking",
    "CalmAutoencoder": "calm.models.autoencoder",
    "CalmAutoencoderConfig": "calm.models.configuration",
    "CalmConfig": "calm.models.configuration",
    "CalmForCausalLM": "calm.models.calm",
    "DiagonalGaussian": "calm.core.gaussian",
    "ExactSampler": "calm.core.samplers",
    "FinetuningRecipe": "calm.training.finetuning_recipe",
    "GenerativeHead": "calm.models.heads",
    "HeadConfig": "calm.models.heads",
    "HeadSampler": "calm.core.samplers",
    "LatentHead": "calm.models.heads",
    "PoolSampler": "calm.core.samplers",
    "Recipe": "calm.training.recipe",
    "block_settings": "calm.training.blocks",
    "brier_lm": "calm.core.brier",
    "brier_scores": "calm.core.brier",
    "continue_texts": "calm.texts",
    "energy_loss": "calm.core.energy",
    "finetune": "calm.training.finetuning",
    "load_autoencoder": "calm.models.loading",
    "load_language_model_and_tokenizer": "calm.models.loading",
    "load_model_and_tokenizer": "calm.models.loading",
    "load_prepared": "calm.data.prepared",
    "load_tokenizer": "calm.data.tokenizer",
    "make_blocks": "calm.data.chunking",
    "prepare": "calm.data.prepare",
    "read_recipe": "calm.training.recipe_files",
    "register_format": "calm.data.formats",
    "register_head": "calm.models.heads",
    "register_optimizer": "calm.training.optimizers",
    "register_sampler": "calm.models.generation.sampler_registry",
    "sample_exact": "calm.core.temperature",
    "sample_from_pool": "calm.core.temperature",
    "sampler_from": "calm.models.generation.sampler_registry",
    "score_model": "calm.evaluation.held_out",
    "train": "calm.training.stages",
    "train_tokenizer": "calm.data.tokenizer",
    "with_settings": "calm.training.recipe_files",
}

# Spelled out, for type checkers.
__all__ = [
    "BlockSettings",
    "CalmAutoencoder",
    "CalmAutoencoderConfig",
    "CalmConfig",
    "CalmForCausalLM",
    "DiagonalGaussian",
    "ExactSampler",
    "FinetuningRecipe",
    "GenerativeHead",
    "HeadConfig",
    "HeadSampler",
    "LatentHead",
    "PoolSampler",
    "Recipe",
    "__version__",
    "block_settings",
    "brier_lm",
    "brier_scores",
    "continue_texts",
    "energy_loss",
    "finetune",
    "load_autoencoder",
    "load_language_model_and_tokenizer",
    "load_model_and_tokenizer",
    "load_prepared",
    "load_tokenizer",
    "make_blocks",
    "prepare",
    "read_recipe",
    "register_format",
    "register_head",
    "register_optimizer",
    "register_sampler",
    "sample_exact",
    "sample_from_pool",
    "sampler_from",
    "score_model",
    "train",
    "train_tokenizer",
    "with_settings",
]
# Names of version 0.1 that have been renamed; kept for one version.
_RENAMED = {"TemperatureSettings": "sampler_from"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"calm.{name} is now calm.{_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'calm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


import_module("calm.renamed").install()

# Registration imports torch, and `calm --help` should answer at once.
if not getattr(sys.modules.get("calm_command"), "is_running", False):
    import_module("calm.models.registration").register()
