"""Low-rank adapters (peft) on the trainable linear layers of a language model."""

import functools
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from calm.errors import InputError
from calm.extras import require
from calm.hub.opening import ignore_peft_deprecations
from calm.models.blocks import SlicedLinear
from calm.models.language_model import language_model
from calm.training.finetuning_recipe import LoraSettings


def check_adapters(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Check that a model can get adapters, before anything is written.

    Raises:
        InputError: If peft is not installed, or a setting is out of range or does not fit the model.
    """
    require("lora.rank", "peft")
    if settings.rank < 1 or not 0 <= settings.dropout < 1 or settings.alpha <= 0:
        raise InputError(
            f"lora needs a rank of at least 1, an alpha above 0 and a dropout from 0 to below 1, got "
            f"{settings.rank}, {settings.alpha} and {settings.dropout}."
        )
    _linear_layers(model, settings.layers)


def with_adapters(model: PreTrainedModel, settings: LoraSettings, base: str) -> Any:
    """A `peft.PeftModel` around the model; only its adapters are trained.

    Args:
        model: A CALM, or a causal language model of transformers. Adapters are inserted in place.
        settings: The adapters.
        base: Folder or hub name of the model; recorded with the adapters.

    Raises:
        InputError: If peft is not installed, or a setting is out of range.
    """
    check_adapters(model, settings)
    import peft  # noqa: PLC0415 (it may be missing)

    # An absolute path, since the adapters may be loaded from another working directory.
    model.name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_linear_layers(model, settings.layers),
    )
    with ignore_peft_deprecations():
        adapted: Any = peft.get_peft_model(model, config)
    # Embeddings have no adapters and are never resized here. To check that, peft would look up the base model
    # on the hub, and warn if it is not there.
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def _linear_layers(model: PreTrainedModel, part: str) -> list[str]:
    """Full names of the linear layers in a part of the model: "backbone", "head" or "both"."""
    parts = language_model(model).parts
    if part == "head" and "head" not in parts:
        raise InputError("an autoregressive model has no generative head; set lora.layers to backbone.")
    prefixes = parts[part] if part in parts else [name for names in parts.values() for name in names]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, SlicedLinear)
        and name.split(".")[0] in prefixes
    ]


def merge_adapters(adapted: Any) -> PreTrainedModel:
    """The model with its adapters merged into its weights; the adapted model is gone afterwards."""
    return adapted.merge_and_unload()
