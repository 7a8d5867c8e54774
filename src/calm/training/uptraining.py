"""Training that starts from a token-level Transformer, which becomes a CALM (docs/uptraining.md)."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from calm.data.prepared import PreparedData
from calm.data.tokenizer import has_tokenizer, load_tokenizer
from calm.errors import InputError
from calm.models.configuration import CalmConfig
from calm.models.context import check_context
from calm.models.hyperparameters import CALM_TYPES
from calm.models.loading import config_of, is_adapter, load_transformer
from calm.models.missing import resolve_name
from calm.models.uptraining import (
    CODE_SIZE,
    Cut,
    PlaceholderTokenizer,
    calm_from_transformer,
    uptrained_config,
)
from calm.text.vocabulary import check_ids
from calm.training.recipe import Recipe


def is_uptraining(recipe: Recipe) -> bool:
    """Whether a recipe converts a token-level Transformer into a CALM.

    Raises:
        InputError: If the model that it starts from has no readable configuration.
    """
    name = recipe.language_model.init_from
    return recipe.model == "calm" and name is not None and is_token_level(config_at(name))


def is_token_level(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a token-level model."""
    return config.model_type not in CALM_TYPES


def config_at(name: str) -> PreTrainedConfig:
    """The configuration of a model that training starts from, or of a teacher.

    Args:
        name: Folder, GGUF file or hub name.

    Raises:
        InputError: If there is none, it cannot be read, or it is that of adapters or of an autoencoder.
    """
    if is_adapter(Path(resolve_name(name))):
        raise InputError(f"'{name}' holds adapters; give the folder of the merged model.")
    config = config_of(name)
    if config.model_type == "calm_autoencoder":
        raise InputError(f"'{name}' holds an autoencoder, not a language model; give the model folder.")
    return config


def with_codes(recipe: Recipe) -> Recipe:
    """An uptraining recipe with the autoencoder that it needs, of kind "codes".

    Raises:
        InputError: If the recipe names a trained one.
    """
    autoencoder = recipe.autoencoder
    if autoencoder.path is not None:
        raise InputError(
            "a CALM initialized from a Transformer learns tokens and needs no trained autoencoder: leave "
            f"out autoencoder.path, which is '{autoencoder.path}'."
        )
    codes = dataclasses.replace(autoencoder, kind="codes", latent_size=CODE_SIZE * recipe.chunk_size)
    return dataclasses.replace(recipe, autoencoder=codes)


def config_to_uptrain(recipe: Recipe, source: PreTrainedConfig) -> CalmConfig:
    """The configuration of the CALM that the Transformer of a recipe becomes.

    Args:
        recipe: The recipe.
        source: The Transformer's configuration. In a folder without a tokenizer, it is enough to plan a run.

    Raises:
        InputError: If the Transformer does not fit.
    """
    assert recipe.language_model.init_from is not None
    name = resolve_name(recipe.language_model.init_from)
    lacks_tokenizer = Path(name).is_dir() and not has_tokenizer(Path(name))
    tokenizer = PlaceholderTokenizer(source) if lacks_tokenizer else load_tokenizer(name)
    config = uptrained_config(source, tokenizer, recipe.chunk_size, cut_of(recipe), **_options(recipe))
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        check_ids(tokenizer, config.vocab_size, name)
    return config


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> None:
    """Raise InputError if text was prepared with another tokenizer than that of the model to be trained.

    Args:
        name: The model's folder or hub name.
        tokenizer: Its tokenizer.
        data: The text.
    """
    if tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise InputError(
            f"the text was prepared with a different tokenizer from that of '{name}'; give the raw text, or "
            f"prepare it with --tokenizer {name}."
        )


def model_to_uptrain(recipe: Recipe, data: PreparedData) -> PreTrainedModel:
    """The CALM of a recipe before training, converted from a Transformer.

    Raises:
        InputError: If the Transformer is damaged, its tokens are not those of the text, or a block exceeds
            the CALM's context.
    """
    name = recipe.language_model.init_from
    assert name is not None
    source = load_transformer(name, dtype=torch.float32)  # On the CPU: a GPU may not have room for both.
    tokenizer = load_tokenizer(resolve_name(name))
    check_tokenizer(name, tokenizer, data)
    set_seed(recipe.seed)  # Codes are drawn first, so they equal those of the run's autoencoder.
    model = calm_from_transformer(source, tokenizer, recipe.chunk_size, cut_of(recipe), **_options(recipe))
    check_context(model.config, recipe.data.context)
    return model


def cut_of(recipe: Recipe) -> Cut:
    """Which layers of the Transformer go where."""
    settings = recipe.language_model.uptraining
    return Cut(settings.first_layers, settings.last_layers, settings.layers)


def _options(recipe: Recipe) -> dict[str, Any]:
    """Further arguments of the conversion."""
    settings = recipe.language_model
    return {"sink": settings.uptraining.sink, "attn_implementation": settings.attention}
