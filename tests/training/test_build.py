"""Hyperparameters are stated once: what a recipe says is what the configurations of its networks hold."""

import dataclasses

import pytest

from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.fields import RANGES as FILE_RANGES
from calm.models.hyperparameters import (
    AutoencoderHyperparameters,
    DecoderHyperparameters,
    InputHyperparameters,
)
from calm.training.build import autoencoder_config, language_model_config, model_config
from calm.training.inputs import digest_of_recipe
from calm.training.ranges import RANGES
from calm.training.recipe import AutoencoderSettings, LanguageModelSettings, Recipe
from calm.training.recipe_files import with_settings

NON_DEFAULTS = {
    "autoencoder.kind": "codes",
    "autoencoder.latent_size": 64,
    "autoencoder.hidden_size": 16,  # With codes, latent size / chunk size.
    "autoencoder.intermediate_size": 24,
    "autoencoder.num_encoder_layers": 4,
    "autoencoder.num_decoder_layers": 6,
    "autoencoder.token_dropout": 0.25,
    "autoencoder.latent_dropout": 0.5,
    "autoencoder.kl_weight": 0.125,
    "autoencoder.kl_floor": 0.75,
    "language_model.hidden_size": 32,
    "language_model.intermediate_size": 40,
    "language_model.num_layers": 3,
    "language_model.num_heads": 4,
    "language_model.num_key_value_heads": 2,
    "language_model.max_chunks": 100,
    "language_model.rope_theta": 500.0,
    "language_model.embedding_initializer_range": 0.5,
    "language_model.backbone_input": "both",
}
LLAMA = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
LLAMA |= {"max_chunks": "max_position_embeddings", "rope_theta": "rope_parameters"}


def field_names(kind):
    return {field.name for field in dataclasses.fields(kind)}


def test_every_hyperparameter_of_a_recipe_reaches_its_configuration():
    recipe = with_settings(Recipe(), NON_DEFAULTS)
    autoencoder = autoencoder_config(recipe, 40, {})
    model = language_model_config(recipe, autoencoder, {})
    for settings, kind, config in (
        (recipe.autoencoder, AutoencoderHyperparameters, autoencoder),
        (recipe.language_model, InputHyperparameters, model),
        (recipe.language_model, DecoderHyperparameters, model.backbone),
    ):
        for name in field_names(kind):
            value, default = getattr(settings, name), getattr(kind(), name)
            assert value != default, name
            actual = getattr(config, LLAMA.get(name, name))
            assert (actual["rope_theta"] if name == "rope_theta" else actual) == value, name


@pytest.mark.parametrize(
    ("recipe", "config", "shared"),
    [
        (AutoencoderSettings, CalmAutoencoderConfig, AutoencoderHyperparameters),
        (LanguageModelSettings, CalmConfig, InputHyperparameters),
    ],
)
def test_recipe_and_configuration_have_the_same_defaults(recipe, config, shared):
    for name in field_names(shared):
        assert getattr(recipe(), name) == getattr(config(), name) == getattr(shared(), name)


def test_ranges_of_model_folders_contain_those_of_recipes():
    for kind, model_type in ((AutoencoderSettings, "calm_autoencoder"), (LanguageModelSettings, "llama")):
        for name, allowed in RANGES[kind].items():
            in_file = FILE_RANGES[model_type].get(LLAMA.get(name, name), allowed)
            assert in_file.low <= allowed.low and in_file.high >= allowed.high, name


def test_a_baseline_is_built_from_the_same_hyperparameters():
    changes = {"model": "autoregressive", "chunk_size": 1, "language_model.num_layers": 3}
    assert model_config(with_settings(Recipe(), changes), 40).num_hidden_layers == 3


def test_digest_of_a_recipe_is_the_recorded_one():
    """With another digest, runs of earlier versions could not be resumed."""
    changes = {
        "autoencoder.path": "a",
        "autoencoder.kind": "codes",
        "autoencoder.training.steps": 3,
        "language_model.backbone_input": "both",
        "language_model.num_heads": 2,
        "language_model.sharded": True,
        "language_model.training.steps": 5,
    }
    assert digest_of_recipe(with_settings(Recipe(), changes)) == "1676c4917fb0bd22436d4189db2b42e5"
