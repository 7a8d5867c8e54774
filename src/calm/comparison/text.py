"""The text that several runs share."""

import dataclasses
from pathlib import Path

from calm.data.prepared import is_prepared, settings_of
from calm.data.stories import NUM_STORIES, write_stories
from calm.errors import InputError
from calm.storage.folders import new_folder
from calm.training.opening import check_data, prepare_text
from calm.training.recipe import Recipe


def with_shared_text(recipe: Recipe, output: Path) -> Recipe:
    """Prepare a recipe's text once for all runs in a folder, and return the recipe with that text.

    Args:
        recipe: A recipe; without sources, it uses the embedded stories.
        output: Absolute path of the folder of the runs, whose recipes refer to the text in it and may be
            read from another directory.

    Raises:
        InputError: If the recipe streams its text, or the folder's text was prepared with other settings.
    """
    if recipe.data.streaming:
        raise InputError(
            "a comparison needs prepared text, which is not streamed: set data.streaming to false."
        )
    check_data(recipe.data, output)
    with new_folder(output):
        if not recipe.data.source_list:
            stories = output / "stories.jsonl"
            if not is_prepared(output / "data"):
                write_stories(stories, recipe.seed, NUM_STORIES)
            recipe = dataclasses.replace(
                recipe, data=dataclasses.replace(recipe.data, sources=[str(stories)])
            )
        folder = prepare_text(recipe, output)
    if folder == output / "data":
        _check_settings(recipe, folder)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=[str(folder)]))


def _check_settings(recipe: Recipe, folder: Path) -> None:
    """Raise InputError if a folder's text was prepared with other settings than a recipe's."""
    data = recipe.data
    lists = {"sources": data.source_list, "validation_sources": data.validation_source_list}
    expected = {"seed": recipe.seed, **dataclasses.asdict(data), **lists}
    actual = settings_of(folder)
    if actual["sources"] != expected["sources"]:
        raise InputError(
            f"'{folder}' was prepared from different sources than the recipe's; choose another --output."
        )
    if changed := next((name for name in actual if actual[name] != expected[name]), None):
        option = changed if changed == "seed" else f"data.{changed}"
        raise InputError(
            f"'{folder}' was prepared with {option} {actual[changed]!r}, not {expected[changed]!r}; choose "
            "another --output."
        )
