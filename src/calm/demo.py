"""`calm demo`: from training to generation on the embedded corpus."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from calm.data.stories import NUM_STORIES, stories, write_stories
from calm.errors import InputError
from calm.evaluation.held_out import Scorecard
from calm.extras import require
from calm.results import ReportOptions, show_results
from calm.storage.folders import check_output, new_folder
from calm.storage.ours import TRAINED
from calm.training.check import check_model
from calm.training.recipe_files import read_recipe
from calm.training.stages import train


def run_demo(
    output: Path, *, recipe_name: str = "demo", num_stories: int = NUM_STORIES, overwrite: bool = False
) -> Scorecard:
    """Generate stories, train on them, score the model on held-out ones, and have it continue some.

    Args:
        output: Folder of the run; report.html and model/ are inside.
        recipe_name: Recipe to train.
        num_stories: Stories to generate; the recipe says which share of them is held out.
        overwrite: Whether to replace what is in that folder.

    Raises:
        InputError: If the folder is not empty, matplotlib is missing, the recipe does not train a CALM, or
            there are too few stories.
    """
    require("the demo", "matplotlib")
    console, start = Console(highlight=False), time.monotonic()

    def say(text: str) -> None:
        console.print(f"[bold]{time.monotonic() - start:5.0f} s[/bold]  {text}")

    recipe = read_recipe(recipe_name)
    if recipe.model != "calm":
        raise InputError(f"the demo trains a CALM; for the recipe '{recipe_name}' use `calm train`.")
    if num_stories < 2:
        raise InputError(f"stories must be at least 2, one to train on and one held out; got {num_stories}.")
    check_output(output, TRAINED if overwrite else None)
    check_model(recipe)
    text = output.with_name(f"{output.name}-stories.jsonl")
    _check_stories(text, recipe.seed)
    say(f"writing {num_stories:,} stories to {text}")
    with _stories_in(text, recipe.seed, num_stories):
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=[str(text)]))
        say("training the autoencoder, then the language model")
        train(recipe, output, overwrite=overwrite)
    say("scoring held-out stories, and letting the model continue some")
    options = ReportOptions(title="CALM on small stories", num_blocks=None, sample_tokens=400)
    return show_results(output, options)


def _check_stories(path: Path, seed: int) -> None:
    """Raise InputError if the file exists, but was not written by the demo."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline(100_000)
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError):
        first = ""
    if first != json.dumps({"text": next(stories(seed))}) + "\n":
        raise InputError(
            f"the demo writes its stories to '{path}', which already exists with other contents; choose "
            "another --output, or move that file away."
        )


@contextlib.contextmanager
def _stories_in(path: Path, seed: int, num_stories: int) -> Iterator[None]:
    """Write a file of stories; if the block raises InputError, delete the file unless it existed before."""
    existed = path.exists()
    with new_folder(path.parent):
        write_stories(path, seed, num_stories)
        try:
            yield
        except InputError:
            if not existed:
                path.unlink()
            raise
