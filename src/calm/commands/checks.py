"""Checks that several commands make before torch is imported."""

from typing import TYPE_CHECKING

from calm.errors import InputError
from calm.ranges import BLOCKS, DRAFT_CHUNKS, NUM_THOUGHTS, ORDERS

if TYPE_CHECKING:
    from calm.training.finetuning_recipe import FinetuningRecipe
    from calm.training.recipe import Recipe


def check_model_exists(model: str) -> None:
    """Raise InputError for a model that does not exist, before torch is imported."""
    from calm.models import missing

    missing.check_model_exists(model)


def check_sampler(name: str | None) -> None:
    """Raise InputError for a sampler that is neither built in nor installed."""
    if name not in (None, "exact", "pool", "head"):
        from calm.models.generation.sampler_registry import check_name

        check_name(name)


def check_counts(ngrams: list[int] | int | None, **counts: int | None) -> None:
    """Raise InputError for an n-gram order, or another number, that is out of range."""
    for order in [ngrams] if isinstance(ngrams, int) else ngrams or []:
        ORDERS.require("ngrams", order)
    for name, number in counts.items():
        if number is not None:
            BLOCKS.require(name, number)


def check_thoughts(**numbers: int | None) -> None:
    """Raise InputError for a number of thoughts that is out of range; None stands for the model's own."""
    for name, number in numbers.items():
        if number is not None:
            NUM_THOUGHTS.require(name, number)


def check_draft(draft: str | None, num_chunks: int | None) -> None:
    """Raise InputError for a number of chunks that is out of range, or is given without a draft."""
    if num_chunks is not None:
        DRAFT_CHUNKS.require("draft_chunks", num_chunks)
        if draft is None:
            raise InputError("--draft_chunks requires a draft model; name one with --draft.")


def vocabulary_note(recipe: "Recipe | FinetuningRecipe", vocab_size: int | None) -> str | None:
    """A note on recipes whose tokenizer, and so their true vocabulary size, is not known yet; else None."""
    from calm.training.recipe import Recipe

    if vocab_size is not None or not isinstance(recipe, Recipe):
        return None
    model = recipe.language_model
    if (recipe.data.tokenizer, recipe.autoencoder.path, model.init_from, model.teacher.model) != (None,) * 4:
        return None
    return "the recipe names no tokenizer, so its data.vocab_size counts; see --vocab_size"
