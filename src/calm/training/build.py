"""Recipe -> configurations and new networks."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from calm.data.prepared import PreparedData
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError, cause_of
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.hyperparameters import AutoencoderHyperparameters, InputHyperparameters, values_of
from calm.models.loading import load_autoencoder_config
from calm.models.missing import resolve_name
from calm.models.shipped import folder_of, tokenizer_of
from calm.models.tokens import LlamaForCausalLM
from calm.models.uptraining import mark_as_new
from calm.text.vocabulary import num_ids
from calm.training.continuing import config_to_continue, model_to_continue
from calm.training.recipe import Recipe

_SMALLEST_CODE = 8  # With fewer dimensions, some of a few thousand random codes are too similar.
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
    _init_from_text(model, data)
    return model


def language_model_of(
    recipe: Recipe, data: PreparedData, autoencoder: CalmAutoencoder | None
) -> PreTrainedModel:
    """The language model of a recipe before training: the one that it starts from, or a new one.

    Args:
        recipe: The recipe.
        data: The text.
        autoencoder: The trained autoencoder; None for an autoregressive model.

    Raises:
        InputError: If the model that it starts from does not fit, or a value is out of range.
    """
    initial = model_to_continue(recipe, data)
    if initial is None:
        if autoencoder is None:
            return new_autoregressive_model(recipe, data)
        return new_language_model(recipe, data, autoencoder)
    if recipe.language_model.new_head:
        assert autoencoder is not None
        return model_with_new_head(recipe, data, autoencoder, initial)
    set_seed(recipe.seed)
    return initial


def untrained_language_model(recipe: Recipe, data: PreparedData) -> PreTrainedModel:
    """A network like the language model of a recipe, with random weights: enough to count and time it.

    No weights are loaded, even if training starts from a model.

    Raises:
        InputError: If the model that training starts from does not fit, or a value is out of range.
    """
    config = model_config(recipe, data.vocab_size)
    is_llama = config.model_type == "llama"  # Ours costs less than that of transformers.
    build: Any = LlamaForCausalLM._from_config if is_llama else AutoModelForCausalLM.from_config
    network: PreTrainedModel = build(
        config, dtype=torch.float32, attn_implementation=recipe.language_model.attention
    )
    return network


def model_with_new_head(
    recipe: Recipe, data: PreparedData, autoencoder: CalmAutoencoder, trained: Any
) -> CalmForCausalLM:
    """A trained CALM with the autoencoder of a recipe and a new head.

    Args:
        recipe: The recipe.
        data: The text.
        autoencoder: The trained autoencoder.
        trained: The trained CALM; its backbone, embeddings and input projection are kept.

    Raises:
        InputError: If they do not fit together, or a value is out of range.
    """
    set_seed(recipe.seed)
    model = CalmForCausalLM(config_with_new_head(recipe, trained.config, autoencoder.config))
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    model.projection.load_state_dict(trained.projection.state_dict())
    weights = trained.backbone.state_dict()
    new = {name: weight for name, weight in model.backbone.state_dict().items() if name not in weights}
    model.backbone.load_state_dict(weights | new)  # New: a final norm, if it had none.
    _init_from_text(model, data)
    mark_as_new(model.head, *([model.backbone.norm] if new else []))
    return model


def _init_from_text(model: CalmForCausalLM, data: PreparedData) -> None:
    """Initialize a new head from statistics of the training text."""
    model.head.init_from_neighbours(lambda: torch.from_numpy(data.neighbour_counts()))
    model.head.init_from_counts(lambda: torch.from_numpy(data.token_counts()))


def new_autoregressive_model(recipe: Recipe, data: PreparedData) -> LlamaForCausalLM:
    """The autoregressive baseline of a recipe before training.

    Raises:
        InputError: If a value is out of range.
    """
    set_seed(recipe.seed)
    model = LlamaForCausalLM(
        autoregressive_config(recipe, data.vocab_size, special_tokens_of(data.tokenizer))
    )
    scale = recipe.language_model.embedding_initializer_range / model.config.initializer_range
    with torch.no_grad():
        model.model.embed_tokens.weight *= scale
    return model


def autoencoder_config(
    recipe: Recipe, vocab_size: int, special_tokens: dict[str, int | None]
) -> CalmAutoencoderConfig:
    """Configuration of a recipe's autoencoder: of the trained one that it names, or of a new one.

    Raises:
        InputError: If a value is out of range.
    """
    settings = recipe.autoencoder
    if settings.path is not None and (Path(folder_of(settings.path)) / "config.json").is_file():
        return load_autoencoder_config(Path(folder_of(settings.path)))
    if isinstance(trained := config_to_continue(recipe), CalmConfig):
        if not recipe.language_model.new_head:
            return trained.autoencoder
        vocab_size = trained.vocab_size  # Its embeddings may be padded.
    if settings.kind == "codes" and settings.latent_size < _SMALLEST_CODE * recipe.chunk_size:
        raise InputError(
            f"token codes need at least {_SMALLEST_CODE} dimensions to be distinct: set "
            f"autoencoder.latent_size to at least {_SMALLEST_CODE * recipe.chunk_size}, not "
            f"{settings.latent_size}."
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
        # The model may be shared; it should not record where the autoencoder was.
        autoencoder_config=autoencoder.to_dict() | {"_name_or_path": ""},
        backbone_config=settings.as_llama(),
        head_config=settings.head,
        **values_of(InputHyperparameters, settings),
        attn_implementation=settings.attention,
        **special_tokens,
    )


def config_with_new_head(
    recipe: Recipe, trained: CalmConfig, autoencoder: CalmAutoencoderConfig
) -> CalmConfig:
    """Configuration of a trained CALM with the head of a recipe.

    A backbone without a final norm, whose `decoder` head had one, gets one unless the new head is a `decoder`
    as well: other heads expect normalized states.

    Args:
        recipe: The recipe.
        trained: The CALM's configuration.
        autoencoder: The autoencoder's configuration.

    Raises:
        InputError: If the autoencoder does not fit the CALM, or a value is out of range.
    """
    name, path = recipe.language_model.init_from, recipe.autoencoder.path
    for unit, has, needs in (
        ("token ids", autoencoder.vocab_size, trained.vocab_size),
        ("tokens in a chunk", autoencoder.chunk_size, trained.chunk_size),
    ):
        if has != needs:
            raise InputError(
                f"'{name}' has {needs} {unit}, but the autoencoder '{path}' has {has}: use another, or leave "
                "out autoencoder.path to train one."
            )
    if trained.reads_latents and (path is None or resolve_name(path) != resolve_name(str(name))):
        raise InputError(
            f"'{name}' reads the latents of its own autoencoder: set autoencoder.path to '{name}' as well."
        )
    head = recipe.language_model.head
    return _build(
        CalmConfig,
        autoencoder_config=autoencoder.to_dict() | {"_name_or_path": ""},
        backbone_config=trained.backbone.to_dict(),
        head_config=head,
        **values_of(InputHyperparameters, trained),
        input_projection=trained.input_projection,
        final_norm=trained.final_norm or head.get("head_type") != "decoder",
        initializer_range=trained.initializer_range,
        layer_norm_eps=trained.layer_norm_eps,
        attn_implementation=recipe.language_model.attention,
        **special_tokens_of(trained),
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
        vocab_size: Number of token ids; None for that of the tokenizer that the recipe uses or would train.
            Not used if training starts from a model, which has its own.

    Raises:
        InputError: If the recipe names a tokenizer but `vocab_size` is None, or a value is out of range.
    """
    config = config_to_continue(recipe)
    if recipe.language_model.new_head and isinstance(config, CalmConfig):
        return config_with_new_head(recipe, config, autoencoder_config(recipe, config.vocab_size, {}))
    if config is not None:
        return config
    size = vocab_size or _num_tokens(recipe)
    if recipe.model == "autoregressive":
        return autoregressive_config(recipe, size, {})
    return language_model_config(recipe, autoencoder_config(recipe, size, {}), {})


def _num_tokens(recipe: Recipe) -> int:
    """Token ids of the tokenizer that a recipe takes, if it is here, or would train."""
    if (name := recipe.data.tokenizer) is None:
        return recipe.data.vocab_size
    location = tokenizer_of(name)
    if not Path(location).exists():
        raise InputError(f"the recipe takes the tokenizer '{name}'; pass --vocab_size, its number of tokens.")
    return num_ids(load_tokenizer(location))


def special_tokens_of(tokenizer: PreTrainedTokenizerBase | PreTrainedConfig) -> dict[str, int | None]:
    """Ids of the padding, BOS and EOS tokens, named as in configurations."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _build(config_class: type[Config], **values: Any) -> Config:
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"the recipe does not define a valid model: {cause_of(error)}") from error
