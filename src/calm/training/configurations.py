"""Recipe -> configurations of the two models."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from calm.core.brier import NUM_ORDERS, window_of
from calm.data.chunking import check_block_size
from calm.errors import InputError, cause_of, reason_of
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.loading import load_autoencoder_config
from calm.models.shipped import folder_of
from calm.training.optimizers import check_optimizer
from calm.training.probing import check_attention, check_compiler, check_memory
from calm.training.ranges import check_ranges
from calm.training.recipe import LanguageModelSettings, Recipe, TrainingSettings

_SMALLEST_CODE = 8  # With fewer, some of a few thousand random codes lie too near to each other.
Config = TypeVar("Config", bound=PreTrainedConfig)


def check_recipe(recipe: Recipe, num_processes: int = 1) -> None:
    """Find the mistakes of a recipe before any work is done.

    Raises:
        InputError: If it names no text, or does not make a model.
    """
    if not recipe.data.source_list:
        raise InputError("the recipe names no text; pass --data.sources FILE or a folder of `calm prepare`.")
    streamed = recipe.data
    if streamed.streaming and (streamed.sample_documents < 2 or streamed.window_documents < 1):
        raise InputError(
            "a stream needs at least 2 sample_documents and 1 window_documents, got "
            f"{streamed.sample_documents} and {streamed.window_documents}."
        )
    check_model(recipe, num_processes)


def check_model(recipe: Recipe, num_processes: int = 1) -> None:
    """`check_recipe` for a recipe whose text is still to be named."""
    check_seed(recipe.seed)
    check_ranges(recipe)
    check_block_size(recipe.data.context, recipe.chunk_size)
    # Held-out text is scored by windows of so many tokens.
    check_block_size(recipe.data.context, window_of(recipe.chunk_size))
    if recipe.chunk_size < NUM_ORDERS and recipe.language_model.attention.startswith("flash"):
        raise InputError(
            f"{recipe.language_model.attention} takes no mask of the kind that scores of chunks below "
            f"{NUM_ORDERS} tokens need; set language_model.attention to sdpa."
        )
    if recipe.model == "autoregressive" and recipe.chunk_size != 1:
        raise InputError(
            f"an autoregressive model predicts single tokens: set chunk_size to 1, not {recipe.chunk_size}."
        )
    _check_network(recipe)
    stages = {"language_model": recipe.language_model.training}
    if recipe.trains_autoencoder:
        stages["autoencoder"] = recipe.autoencoder.training
    for name, training in stages.items():
        check_training(training, f"{name}.training", recipe.data.context, num_processes)
    check_attention(recipe.language_model)


def check_training(training: TrainingSettings, name: str, context: int, num_processes: int) -> None:
    """Find the mistakes of how a stage is trained.

    Args:
        training: Its settings.
        name: How they are called, for the message.
        context: Tokens of a block.
        num_processes: Processes that share the work.

    Raises:
        InputError: If a value is out of range, or the optimizer is unknown or does not take its settings.
    """
    check_optimizer(training.optimizer)
    check_compiler(training, name)
    try:
        training.batches(context, num_processes)
    except InputError as error:
        raise InputError(f"{name}.{error}") from error


def check_seed(seed: int) -> None:
    """Raise InputError if a seed is none that all generators take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"the seed must lie between 0 and {2**32 - 1}, got {seed}.")


def _check_network(recipe: Recipe) -> None:
    """Build the network of a recipe without memory: what it refuses is told before any work is done."""
    network: Any = LlamaForCausalLM if recipe.model == "autoregressive" else CalmForCausalLM
    config = model_config(recipe, vocab_size=1)
    try:
        with torch.device("meta"):
            check_memory(network(config))
    except InputError:
        raise
    except (ValueError, ImportError) as error:
        raise InputError(f"the recipe does not make a model: {reason_of(error)}") from error


def autoencoder_config(
    recipe: Recipe, vocab_size: int, special_tokens: dict[str, int | None]
) -> CalmAutoencoderConfig:
    """Configuration of the autoencoder of a recipe; that of a trained one if the recipe names it.

    Raises:
        InputError: If a value is out of range.
    """
    settings = recipe.autoencoder
    if settings.path is not None and (Path(folder_of(settings.path)) / "config.json").is_file():
        return load_autoencoder_config(Path(folder_of(settings.path)))
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
        kind=settings.kind,
        latent_size=settings.latent_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_encoder_layers=settings.num_encoder_layers,
        num_decoder_layers=settings.num_decoder_layers,
        token_dropout=settings.token_dropout,
        latent_dropout=settings.latent_dropout,
        kl_weight=settings.kl_weight,
        kl_floor=settings.kl_floor,
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
        # Where it lay is nobody's business who gets the model.
        autoencoder_config=autoencoder.to_dict() | {"_name_or_path": ""},
        backbone_config=_decoder_fields(settings),
        head_config=settings.head,
        embedding_initializer_range=settings.embedding_initializer_range,
        backbone_input=settings.backbone_input,
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
        **_decoder_fields(settings),
        **special_tokens,
    )


def model_config(recipe: Recipe, vocab_size: int | None = None) -> CalmConfig | LlamaConfig:
    """Configuration of the language model of a recipe, before there is a tokenizer.

    Args:
        recipe: The recipe.
        vocab_size: Number of token ids; that of the tokenizer the recipe would train when None.

    Raises:
        InputError: If the recipe takes a tokenizer that is not here, or a value is out of range.
    """
    if vocab_size is None and recipe.data.tokenizer is not None:
        raise InputError(
            f"the recipe takes the tokenizer '{recipe.data.tokenizer}'; "
            "say --vocab_size, its number of tokens."
        )
    size = vocab_size or recipe.data.vocab_size
    if recipe.model == "autoregressive":
        return autoregressive_config(recipe, size, {})
    return language_model_config(recipe, autoencoder_config(recipe, size, {}), {})


def _decoder_fields(settings: LanguageModelSettings) -> dict[str, Any]:
    """Fields of the Llama decoder that both kinds of model have."""
    return {
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_key_value_heads,
        "max_position_embeddings": settings.max_chunks,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
    }


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
