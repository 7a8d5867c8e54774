"""Continued pre-training: training that starts from the weights of an existing model."""

import dataclasses
import logging
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from calm.data.prepared import PreparedData
from calm.errors import InputError, cause_of
from calm.models.configuration import CalmConfig
from calm.models.context import check_context
from calm.models.heads import parse_head_config
from calm.models.loading import load_language_model_and_tokenizer
from calm.models.missing import resolve_name
from calm.models.thoughts import unlearn_thoughts
from calm.training.recipe import Recipe
from calm.training.teacher import with_teacher_tokenizer
from calm.training.uptraining import (
    check_tokenizer,
    config_at,
    config_to_uptrain,
    is_token_level,
    is_uptraining,
    model_to_uptrain,
    with_codes,
)

logger = logging.getLogger(__name__)


def with_inherited_parts(recipe: Recipe) -> Recipe:
    """Add the tokenizer and autoencoder of the model that a recipe starts from, or its teacher's tokenizer.

    Raises:
        InputError: If the recipe names others than those of the model.
    """
    if recipe.language_model.init_from is None:
        return with_teacher_tokenizer(recipe)
    name, is_uptrained = resolve_name(recipe.language_model.init_from), is_uptraining(recipe)
    has_autoencoder = recipe.model == "calm" and not (is_uptrained or recipe.language_model.new_head)
    inherited = {"data": "tokenizer"} | ({"autoencoder": "path"} if has_autoencoder else {})
    for part, setting in inherited.items():
        settings = getattr(recipe, part)
        if getattr(settings, setting) not in (None, name, recipe.language_model.init_from):
            component = "tokenizer" if part == "data" else "autoencoder"
            raise InputError(
                f"'{name}' has its own {component}: set {part}.{setting} to '{name}' or leave it out; it is "
                f"'{getattr(settings, setting)}'."
            )
        recipe = dataclasses.replace(recipe, **{part: dataclasses.replace(settings, **{setting: name})})
    return with_codes(recipe) if is_uptrained else recipe


def config_to_continue(recipe: Recipe) -> PreTrainedConfig | None:
    """The configuration of the model that a recipe starts from, with its own head; None if there is none.

    Settings for training that head come from the recipe.

    Raises:
        InputError: If the model does not exist, its kind is not the recipe's, or the recipe's head has an
            unknown field or a value out of range.
    """
    name, has_new_head = recipe.language_model.init_from, recipe.language_model.new_head
    if name is None:
        if has_new_head:
            raise InputError(
                "language_model.new_head needs a CALM to start from: name one in language_model.init_from, "
                "or set language_model.new_head to false."
            )
        return None
    config = config_at(name)
    if has_new_head and not isinstance(config, CalmConfig):
        raise InputError(
            f"language_model.new_head requires a CALM, but '{name}' is a model of type "
            f"'{config.model_type}': set it to false."
        )
    if recipe.model == "calm" and is_token_level(config):
        return config_to_uptrain(recipe, config)
    kind, size = ("calm", config.chunk_size) if isinstance(config, CalmConfig) else ("autoregressive", 1)
    if (recipe.model, recipe.chunk_size) != (kind, size):
        description = (
            f"a CALM with chunks of {size} tokens"
            if kind == "calm"
            else f"a token-level {config.model_type} model"
        )
        raise InputError(f"'{name}' is {description}: set model to {kind} and chunk_size to {size}.")
    if isinstance(config, CalmConfig) and not has_new_head:  # Costs may depend on how a head is trained.
        config.change_training(**_training_fields(recipe, config))
    return config


def model_to_continue(recipe: Recipe, data: PreparedData) -> PreTrainedModel | None:
    """The model that a recipe starts from, with its own head; None if there is none.

    Raises:
        InputError: If it is damaged, its tokens are not those of the text, or a block exceeds its context.
    """
    name = recipe.language_model.init_from
    if config_to_continue(recipe) is None or name is None:
        return None
    if is_uptraining(recipe):
        return model_to_uptrain(recipe, data)
    model, tokenizer = load_language_model_and_tokenizer(
        name, dtype=torch.float32, attn_implementation=recipe.language_model.attention
    )
    check_tokenizer(name, tokenizer, data)
    check_context(model.config, recipe.data.context)
    unlearn_thoughts(model.config, name, "trained on text")
    if isinstance(model.config, CalmConfig) and not recipe.language_model.new_head:
        cast(Any, model).change_training(**_training_fields(recipe, model.config))
    return model


def _training_fields(recipe: Recipe, config: CalmConfig) -> dict[str, Any]:
    """The recipe's settings for training a model's existing head.

    Raises:
        InputError: If a field of the recipe's head is unknown, or a value is out of range. Other fields have
            no effect here, but a misspelled `loss` must not pass for one of them.
    """
    head = recipe.language_model.head
    try:
        parse_head_config(head)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"language_model.head of the recipe is not a valid head: {cause_of(error)}"
        ) from error
    if head.get("head_type") != config.head.head_type:
        return {}
    return {name: head[name] for name in config.head.training_fields if name in head}


def log_initial_model(recipe: Recipe) -> None:
    """Log which model training starts from, since its sizes replace the recipe's."""
    name = recipe.language_model.init_from
    if name is not None and recipe.language_model.new_head:
        head = recipe.language_model.head.get("head_type", "energy")
        logger.info("training starts from the backbone of '%s' with a new head, %s", name, head)
    elif name is not None:
        logger.info("training starts from the weights of '%s'; the recipe's sizes and head are ignored", name)
