"""Recipe -> configurations and new networks."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from calm.data.prepared import PreparedData
from calm.errors import InputError, cause_of
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.hyperparameters import AutoencoderHyperparameters, InputHyperparameters, values_of
from calm.models.loading import load_autoencoder_config
from calm.models.shipped import folder_of
from calm.models.tokens import LlamaForCausalLM
from calm.training.continuing import config_to_continue
from calm.training.recipe import Recipe

_SMALLEST_CODE = 8  # With fewer, some of a few thousand random codes are too close to each other.
Config = TypeVar("Config", bound=PreTrainedConfig)


def new_autoencoder(recipe: Recipe, data: PreparedData) -> CalmAutoencoder:
    """The autoencoder of a recipe before training.

    Raises:
        InputError: If a value is out of range.
    """
    set_seed(recipe.seed)
    return CalmAutoencoder(autoencoder_config(recipe, data.vocab_size, special_tokens_of(data.tokenizer)))


def new_language_model(recipe: Recipe, data: PreparedData, autoencoder: CalmAutoencoder) -> CalmForCausalLM:
    """The language model of a recipe before training, with a trained autoencoder inside.

    Raises:
        InputError: If a value is out of range.
    """
    set_seed(recipe.seed)
    special = special_tokens_of(data.tokenizer)
    model = CalmForCausalLM(language_model_config(recipe, autoencoder.config, special))
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    model.head.init_from_counts(lambda: torch.from_numpy(data.token_counts()))
    return model


def new_autoregressive_model(recipe: Recipe, data: PreparedData) -> LlamaForCausalLM:
    """The autoregressive baseline of a recipe before training.

    Raises:
        InputError: If a value is out of range.
    """
    set_seed(recipe.seed)
    model = LlamaForCausalLM(
        autoregressive_config(recipe, data.vocab_size, special_tokens_of(data.tokenizer))
    )
    spread = recipe.language_model.embedding_initializer_range / model.config.initializer_range
    with torch.no_grad():
        model.model.embed_tokens.weight *= spread
    return model


def autoencoder_config(
    recipe: Recipe, vocab_size: int, special_tokens: dict[str, int | None]
) -> CalmAutoencoderConfig:
    """Configuration of the autoencoder of a recipe; that of the trained one if the recipe names one.

    Raises:
        InputError: If a value is out of range.
    """
    settings = recipe.autoencoder
    if settings.path is not None and (Path(folder_of(settings.path)) / "config.json").is_file():
        return load_autoencoder_config(Path(folder_of(settings.path)))
    if isinstance(begun := config_to_continue(recipe), CalmConfig):
        return begun.autoencoder
    if settings.kind == "codes" and settings.latent_size < _SMALLEST_CODE * recipe.chunk_size:
        raise InputError(
            f"codes of tokens need at least {_SMALLEST_CODE} dimensions to be told apart: set "
            f"autoencoder.latent_size to at least {_SMALLEST_CODE * recipe.chunk_size}, "
            f"not {settings.latent_size}."
        )
    return _build(
        CalmAutoencoderConfig,
        vocab_size=vocab_size,
        chunk_size=recipe.chunk_size,
        **values_of(AutoencoderHyperparameters, settings),
        dropped_token_id=special_tokens.get("pad_token_id") or 0,
        **special_tokens,
    )


def language_model_config(
    recipe: Recipe, autoencoder: CalmAutoencoderConfig, special_tokens: dict[str, int | None]
) -> CalmConfig:
    """Configuration of the language model of a recipe around an autoencoder.

    Raises:
        InputError: If a value is out of range.
    """
    settings = recipe.language_model
    return _build(
        CalmConfig,
        # Whoever gets the model need not know where the autoencoder was.
        autoencoder_config=autoencoder.to_dict() | {"_name_or_path": ""},
        backbone_config=settings.as_llama(),
        head_config=settings.head,
        **values_of(InputHyperparameters, settings),
        attn_implementation=settings.attention,
        **special_tokens,
    )


def autoregressive_config(
    recipe: Recipe, vocab_size: int, special_tokens: dict[str, int | None]
) -> LlamaConfig:
    """Configuration of the autoregressive baseline of a recipe: a Llama with untied embeddings.

    Raises:
        InputError: If a value is out of range.
    """
    settings = recipe.language_model
    return _build(
        LlamaConfig,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
        attn_implementation=settings.attention,
        **settings.as_llama(),
        **special_tokens,
    )


def model_config(recipe: Recipe, vocab_size: int | None = None) -> PreTrainedConfig:
    """Configuration of the language model of a recipe, without its tokenizer.

    Args:
        recipe: The recipe.
        vocab_size: Number of token ids; that of the tokenizer the recipe would train when None. A model that
            training begins with has its own.

    Raises:
        InputError: If the recipe takes a tokenizer that is not here, or a value is out of range.
    """
    if (config := config_to_continue(recipe)) is not None:
        return config
    if vocab_size is None and recipe.data.tokenizer is not None:
        raise InputError(
            f"the recipe takes the tokenizer '{recipe.data.tokenizer}'; "
            "pass --vocab_size, its number of tokens."
        )
    size = vocab_size or recipe.data.vocab_size
    if recipe.model == "autoregressive":
        return autoregressive_config(recipe, size, {})
    return language_model_config(recipe, autoencoder_config(recipe, size, {}), {})


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Ids of padding, beginning and end of text, as configurations name them."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _build(config_class: type[Config], **values: Any) -> Config:
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"the recipe does not make a model: {cause_of(error)}") from error
