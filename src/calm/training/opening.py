"""Open a run: check everything its recipe names before anything is written, then prepare the text.

A rejected command leaves the output folder as it was.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calm.data.options import ReadingOptions
from calm.data.prepare import check_text, log_counts, prepare
from calm.data.prepared import PreparedData, is_prepared, load_prepared
from calm.data.shards import check_sources
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError
from calm.models.autoencoder import CalmAutoencoder
from calm.models.configuration import CalmAutoencoderConfig
from calm.models.loading import check_readable, load_autoencoder
from calm.models.shipped import tokenizer_of
from calm.training.check import check_recipe
from calm.training.continuing import model_to_continue
from calm.training.inputs import check_recipe_and_inputs, digest_of_files, digest_of_weights
from calm.training.processes import processes
from calm.training.recipe import DataSettings, Recipe
from calm.training.runs import DATA, Run
from calm.training.sharding import check_sharding
from calm.training.teacher import check_teacher_tokenizer, teacher_config, teacher_of


@contextlib.contextmanager
def open_run(run: Run[Recipe]) -> Iterator[PreparedData]:
    """Yield the text of a run, whose folder is locked for the block.

    Recipe, folder and sources are checked first; then the main process prepares the text.

    Raises:
        InputError: If anything that the recipe names is missing or not valid.
        RunError: If the text cannot be prepared; see `calm.data.prepare.prepare`.
    """
    group, recipe = processes(), run.recipe
    check_recipe(recipe, group.num_processes)
    check_sharding(recipe)
    with run.locked(_input_paths(recipe)):
        if group.is_main_process:
            _set_up(run)
        group.wait_for_everyone()
        yield load_prepared(data_folder(recipe, run.folder), verify=False)  # The main process has.


def _set_up(run: Run[Recipe]) -> None:
    """Check the models that a run names, prepare its text, and check its inputs against those on record."""
    recipe, output = run.recipe, run.folder
    check_data(recipe.data, output if run.resume else None)
    _check_models(recipe, has_text=run.resume and is_prepared(output / DATA))
    autoencoder = trained_autoencoder(recipe)
    with run.set_up():
        was_prepared = is_prepared(data_folder(recipe, output))
        folder = prepare_text(recipe, output)
        data = load_prepared(folder)
        if was_prepared:
            log_counts(folder, data)
        if autoencoder is not None:
            check_vocabulary(autoencoder.config, recipe, data)
        check_recipe_and_inputs(output, recipe, _input_digests(recipe, data, autoencoder))


def _check_models(recipe: Recipe, *, has_text: bool) -> None:
    """Check what can be checked of a recipe's models before the text is prepared, which may take hours.

    They are loaded later, when their tokens can be compared with those of the text.

    Args:
        recipe: The recipe.
        has_text: Whether the run is resumed and has its text; then the recipe's tokenizer is not read.

    Raises:
        InputError: If weights are missing or truncated, or a teacher's tokens are not those of the recipe's
            tokenizer.
    """
    if (name := recipe.language_model.init_from) is not None:
        check_readable(name)
    if teacher_config(recipe) is None or (teacher := recipe.language_model.teacher.model) is None:
        return
    check_readable(teacher)
    tokenizer = recipe.data.tokenizer
    if tokenizer is not None and not has_text and _prepared_source(recipe.data) is None:
        check_teacher_tokenizer(teacher, load_tokenizer(tokenizer_of(tokenizer)))


def _input_digests(recipe: Recipe, data: PreparedData, autoencoder: CalmAutoencoder | None) -> dict[str, str]:
    """Digests of everything besides the recipe that determines the result."""
    inputs = {"its prepared text (with the tokenizer)": data.digest}
    if recipe.data.streaming:
        inputs["its streamed text"] = digest_of_files(recipe.data.source_list)
    if autoencoder is not None:
        inputs[f"the autoencoder '{recipe.autoencoder.path}'"] = digest_of_weights(autoencoder)
    if (model := model_to_continue(recipe, data)) is not None:
        inputs[f"the model '{recipe.language_model.init_from}'"] = digest_of_weights(model)
    if (teacher := teacher_of(recipe, data)) is not None:
        inputs[f"the teacher '{teacher.settings.model}'"] = digest_of_weights(teacher.network)
    return inputs


def check_data(settings: DataSettings, output: Path | None = None) -> None:
    """Check the data settings of a recipe, before anything is written.

    Args:
        settings: The data settings.
        output: Folder of a run that is resumed; None for a new one.

    Raises:
        InputError: If a source is missing or of an unknown format, prepared text is damaged, or a setting
            is not valid.
    """
    reading_options(settings)
    if (folder := _prepared_source(settings)) is not None:
        load_prepared(folder)
    elif output is None or not is_prepared(output / DATA):
        check_text(settings.source_list, **_preparation(settings))
    elif settings.streaming:
        check_sources(settings.source_list)


def data_folder(recipe: Recipe, output: Path) -> Path:
    """Folder of a recipe's prepared text: the one that its sources name, or `output`/data.

    Raises:
        InputError: If the sources name prepared text, which cannot be streamed, and the recipe streams.
    """
    return _prepared_source(recipe.data) or output / DATA


def prepare_text(recipe: Recipe, output: Path) -> Path:
    """Prepare the text of a recipe, unless it is prepared already.

    Returns:
        Its `data_folder`.

    Raises:
        InputError: If a source or setting is not valid.
        RunError: If the text cannot be prepared; see `calm.data.prepare.prepare`.
    """
    settings, folder = recipe.data, data_folder(recipe, output)
    if not is_prepared(folder):
        prepare(
            settings.source_list,
            folder,
            options=reading_options(settings),
            seed=recipe.seed,
            num_proc=settings.num_proc,
            max_documents=settings.sample_documents if settings.streaming else None,
            **_preparation(settings),
        )
    return folder


def reading_options(settings: DataSettings) -> ReadingOptions:
    """How documents are found in the sources of a recipe."""
    return ReadingOptions(
        text_field=settings.text_field,
        separator=settings.separator,
        max_document_mb=settings.max_document_mb,
    )


def trained_autoencoder(recipe: Recipe) -> CalmAutoencoder | None:
    """The trained autoencoder that a recipe names; None if it names none.

    Raises:
        InputError: If it does not exist, is damaged, or has another chunk size than the recipe.
    """
    path = recipe.autoencoder.path
    if recipe.model != "calm" or path is None:
        return None
    autoencoder = load_autoencoder(Path(path))
    if autoencoder.config.chunk_size != recipe.chunk_size:
        raise InputError(
            f"the autoencoder '{path}' has chunks of {autoencoder.config.chunk_size} tokens, but the recipe "
            f"has {recipe.chunk_size}; set chunk_size to {autoencoder.config.chunk_size}."
        )
    return autoencoder


def check_vocabulary(config: CalmAutoencoderConfig, recipe: Recipe, data: PreparedData) -> None:
    """Raise InputError if the tokenizer has more tokens than the trained autoencoder of a recipe."""
    if data.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {data.vocab_size} tokens, more than the {config.vocab_size} of the "
            f"autoencoder '{recipe.autoencoder.path}'; prepare the text with the autoencoder's tokenizer."
        )


def _prepared_source(settings: DataSettings) -> Path | None:
    """The prepared folder that a recipe names as its source; None if it names none."""
    if len(settings.source_list) != 1 or not is_prepared(Path(settings.source_list[0])):
        return None
    if settings.streaming:
        raise InputError(f"'{settings.source_list[0]}' is prepared text; streaming needs the raw text.")
    return Path(settings.source_list[0])


def _input_paths(recipe: Recipe) -> list[str]:
    """Paths and names of everything a recipe reads."""
    data, language_model = recipe.data, recipe.language_model
    names = (
        data.tokenizer,
        recipe.autoencoder.path,
        language_model.init_from,
        language_model.teacher.model,
    )
    return [*data.source_list, *data.validation_source_list, *(name for name in names if name is not None)]


def _preparation(settings: DataSettings) -> dict[str, Any]:
    """Arguments that `check_text` and `prepare` have in common."""
    return {
        "tokenizer": None if settings.tokenizer is None else tokenizer_of(settings.tokenizer),
        "vocab_size": settings.vocab_size,
        "validation_sources": settings.validation_source_list,
        "validation_fraction": settings.validation_fraction,
    }
