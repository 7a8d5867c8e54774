"""What a finished run shows: its scores, samples, a report, and which commands to try next."""

import dataclasses
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.prepared import PreparedData, load_prepared
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError
from calm.evaluation.held_out import Scorecard, affordable_orders, score_model
from calm.extras import is_installed, not_installed
from calm.facts import facts_of
from calm.models.loading import load_language_model_and_tokenizer
from calm.report.run import RunReport, Sample, read_history, write_report
from calm.report.tables import print_scorecard
from calm.storage.disk import read_json_lines
from calm.texts import continue_texts
from calm.training.blocks import block_settings
from calm.training.finetuning import ANSWERS
from calm.training.opening import data_folder
from calm.training.processes import processes
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, read_recipe
from calm.training.runs import HISTORY
from calm.training.teacher import read_teacher_facts

logger = logging.getLogger(__name__)
REPORT = "report.html"
NUM_SAMPLES, NUM_ANSWERS = 6, 3
_LABELS = {"completion": "expected:", "before": "before:", "after": "now:"}
_FLOORS = (3, 5)  # Orders of n-gram models.
_TEMPERATURE = 0.5  # Of the samples.


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """How much of a finished run is shown.

    Args:
        title: Heading of the report.
        num_blocks: Held-out blocks to score; None for all.
        sample_tokens: Maximum tokens of a sample.
    """

    title: str
    num_blocks: int | None = 256
    sample_tokens: int = 150


def show_results(folder: Path, options: ReportOptions) -> Scorecard:
    """Score the model of a run on its held-out text, generate samples, and write the report.

    All processes of a run call this together; the first prints and writes.

    Args:
        folder: Folder of the run.
        options: How much to show.

    Raises:
        InputError: If the held-out text is too short to score, or a file of the run is damaged.
    """
    recipe = read_recipe(str(folder / RECIPE))
    data = load_prepared(data_folder(recipe, folder))
    model, tokenizer = load_language_model_and_tokenizer(str(folder / "model"))
    card = score_model(
        model,
        data,
        block_settings(recipe),
        ngrams=_floors(recipe, data),
        num_blocks=options.num_blocks,
    )
    if not processes().is_main_process:
        return card
    print_scorecard(card)
    samples = _generate_samples(model, tokenizer, data, recipe.seed, options)
    console = Console(highlight=False)
    for sample in samples:
        console.print(f"[bold]{escape(sample.prompt)}[/bold]{escape(sample.continuation)}\n")
    _write_report(folder, recipe, options.title, card, samples, model)
    path = shlex.quote(str(folder))
    words = " ".join(samples[0].prompt.split()[:4]) if samples else "Once"
    _print_next(f"generate {path} {shlex.quote(words)} --stream", f"serve {path}")
    return card


def _floors(recipe: Recipe, data: PreparedData) -> Sequence[int]:
    """Orders of the n-gram floors; none if the training text is streamed or too long."""
    if recipe.data.streaming:
        logger.info("no n-gram floors: the training text is streamed")
        return []
    return affordable_orders(_FLOORS, data)


def _generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    seed: int,
    options: ReportOptions,
) -> list[Sample]:
    """Continuations of the first words of held-out documents."""
    beginnings = data.held_out_beginnings(NUM_SAMPLES)
    continuations = continue_texts(
        model,
        tokenizer,
        [beginning for beginning, _ in beginnings],
        at_most=options.sample_tokens,
        temperature=_TEMPERATURE,
        seed=seed,
        crop=True,
    )
    return [
        Sample(prompt, continuation, truth)
        for (prompt, truth), continuation in zip(beginnings, continuations, strict=True)
    ]


def _write_report(
    folder: Path, recipe: Recipe, title: str, card: Scorecard, samples: list[Sample], model: PreTrainedModel
) -> None:
    if not is_installed("matplotlib"):
        logger.warning("no report was written: %s", not_installed("it", "matplotlib"))
        return
    history = read_history(folder / HISTORY)
    text = (folder / RECIPE).read_text(encoding="utf-8")
    facts = facts_of(recipe, model, history, read_teacher_facts(folder))
    write_report(folder / REPORT, RunReport(title, card, history, samples, text, facts))
    print(f"report: {folder / REPORT}")


def _print_next(*commands: str) -> None:
    print("next:   " + "\n        ".join(f"calm {command}" for command in commands))


def show_results_once(folder: Path) -> None:
    """`show_results` for a run that has no report yet; if it cannot be scored, log why."""
    if (folder / REPORT).is_file():
        return
    try:
        show_results(folder, ReportOptions(title=folder.resolve().name))
    except InputError as error:
        logger.warning("no scores: %s", error)


def show_answers(folder: Path) -> None:
    """Print a few held-out prompts of a fine-tuning run with its answers, and which commands to try next.

    Args:
        folder: Folder of the run.
    """
    if not processes().is_main_process:
        return
    console = Console(highlight=False)
    for record in read_json_lines(folder / ANSWERS)[:NUM_ANSWERS]:
        console.print(f"[bold]{escape(record['prompt'].strip())}[/bold]")
        for name in ("completion", "before", "after"):
            console.print(f"  {_LABELS[name]:<9} {escape(record[name].strip())}")
    path = shlex.quote(str(folder))
    tokenizer = load_tokenizer(str(folder / "model"))
    use = f"chat {path}" if tokenizer.chat_template else f"generate {path} --file questions.txt"
    _print_next(use, f"serve {path}")
