"""`calm demo`: the main job from end to end on the embedded corpus."""

import contextlib
import dataclasses
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from calm.data.prepared import PreparedData, load_prepared
from calm.data.stories import NUM_STORIES, stories, write_stories
from calm.errors import InputError
from calm.evaluation.held_out import Scorecard, score_model
from calm.facts import facts_of
from calm.models.calm import CalmForCausalLM
from calm.models.loading import load_model_and_tokenizer
from calm.report.run import RunReport, Sample, read_history, write_report
from calm.report.tables import print_scorecard
from calm.storage.folders import check_output, new_folder
from calm.storage.ours import TRAINED
from calm.texts import continue_texts
from calm.training.check import check_model
from calm.training.recipe_files import RECIPE, read_recipe
from calm.training.runs import HISTORY
from calm.training.stages import train

NUM_SAMPLES = 6
_FLOORS = [3, 5]


def run_demo(
    output: Path, *, recipe_name: str = "demo", num_stories: int = NUM_STORIES, overwrite: bool = False
) -> Scorecard:
    """Write stories, train on them, score the model on stories it has not seen, and let it write.

    Args:
        output: Folder of the run; report.html and model/ are inside.
        recipe_name: Recipe to follow.
        num_stories: Stories to write; a share of them, which the recipe names, is held out.
        overwrite: Whether to remove what is in that folder first.

    Raises:
        InputError: If the folder is not empty, matplotlib is missing or there are too few stories.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the demo draws plots; pip install 'calm-lm[report]' first.")
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
        folder = train(recipe, output, overwrite=overwrite)
    say("scoring held-out stories")
    model, tokenizer = load_model_and_tokenizer(str(folder))
    data = load_prepared(output / "data")
    card = score_model(model, data, context=recipe.data.context, ngrams=_FLOORS, layout_seed=recipe.seed)
    print_scorecard(card)
    say("continuing held-out stories at temperature 0.5")
    samples = write_samples(model, tokenizer, data, recipe.seed)
    for sample in samples:
        console.print(f"[bold]{sample.prompt}[/bold]{sample.continuation}\n", markup=True)
    report = output / "report.html"
    history = read_history(output / HISTORY)
    write_report(
        report,
        RunReport(
            title="CALM on small stories",
            card=card,
            history=history,
            samples=samples,
            recipe=(output / RECIPE).read_text(encoding="utf-8"),
            facts=facts_of(recipe, model, history),
        ),
    )
    say(f"model: {folder}   report: {report}")
    return card


def _check_stories(path: Path, seed: int) -> None:
    """Raise InputError if a file is there that the demo has not written."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline(100_000)
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError):
        first = ""
    if first != json.dumps({"text": next(stories(seed))}) + "\n":
        raise InputError(
            f"the demo writes its stories to '{path}', which is there and holds something else; choose "
            "another --output, or move that file away."
        )


@contextlib.contextmanager
def _stories_in(path: Path, seed: int, number: int) -> Iterator[None]:
    """A file of stories; if the block refuses its input, a file that was not there before goes again."""
    was_there = path.exists()
    with new_folder(path.parent):
        write_stories(path, seed, number)
        try:
            yield
        except InputError:
            if not was_there:
                path.unlink()
            raise


def write_samples(
    model: CalmForCausalLM, tokenizer: PreTrainedTokenizerBase, data: PreparedData, seed: int
) -> list[Sample]:
    """Continue the first words of held-out stories."""
    beginnings = data.held_out_beginnings(NUM_SAMPLES)
    prompts = [beginning for beginning, _ in beginnings]
    continuations = continue_texts(model, tokenizer, prompts, at_most=400, temperature=0.5, seed=seed)
    return [
        Sample(prompt, continuation, truth)
        for (prompt, truth), continuation in zip(beginnings, continuations, strict=True)
    ]
