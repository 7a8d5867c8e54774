"""Commands that train and compare models: typed functions whose docstrings are their help.

torch and transformers are imported inside the commands, so that `calm --help` answers at once.
"""

import contextlib
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from calm.data.stories import NUM_STORIES
from calm.errors import InputError, RunError, Terminated
from calm.ranges import BLOCKS, DOCUMENT_MB, SEEDS, Range
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import Recipe

logger = logging.getLogger(__name__)


def demo(
    output: str = "runs/demo", overwrite: bool = False, recipe: str = "demo", stories: int = NUM_STORIES
) -> None:
    """Train on the embedded stories, score the model, and generate.

    Args:
        output: Folder of the run.
        overwrite: Replace what is in that folder.
        recipe: Recipe to train.
        stories: Number of stories to generate for training and scoring.
    """
    from calm.demo import run_demo

    run_demo(Path(output), recipe_name=recipe, num_stories=stories, overwrite=overwrite)


def prepare_text(
    sources: list[str],
    output: str,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    text_field: list[str] | str = "text",
    separator: str | None = None,
    max_document_mb: int = 1000,
    validation: list[str] | str | None = None,
    validation_fraction: float = 0.02,
    seed: int = 0,
    num_proc: int | None = None,
    engine: Literal["processes", "ray"] = "processes",
    overwrite: bool = False,
) -> None:
    """Turn text into a prepared folder: tokenizer, tokenized training and held-out documents.

    Args:
        sources: Files (.jsonl, .parquet, plain text such as .txt and .md; also .gz, .xz, .zst, .bz2), folders
            of these, folders from save_to_disk, or hub datasets.
        output: Output folder.
        tokenizer: Folder, tokenizer.json, run, shipped model or hub name; by default, a byte-level BPE is
            trained on the text.
        vocab_size: Vocabulary size of a trained tokenizer.
        text_field: Record field that contains the text; several, such as title,text, are joined.
        separator: Line that separates the documents of a plain-text file ("" for a blank line).
        max_document_mb: Maximum length of a document or line in MB (10^6 bytes); each is read into memory.
        validation: Sources of held-out text; by default, the split "validation" of a saved DatasetDict, or
            else a part of the sources.
        validation_fraction: Share of the text to hold out: of its documents, or of parts of long ones.
        seed: Seed of the held-out split.
        num_proc: Number of processes; one per core by default.
        engine: What reads and tokenizes: processes here, or Ray Data, on one machine or many.
        overwrite: Replace the output folder.
    """
    SEEDS.require("seed", seed)
    DOCUMENT_MB.require("max_document_mb", max_document_mb)
    if num_proc is not None:
        Range(1, 4096).require("num_proc", num_proc)
    from calm.data.options import ReadingOptions
    from calm.data.prepare import prepare as run
    from calm.models.shipped import tokenizer_of
    from calm.storage.locks import check_unlocked

    check_unlocked(Path(output).absolute().parent)
    data = run(
        sources,
        Path(output),
        options=ReadingOptions(text_field=text_field, separator=separator, max_document_mb=max_document_mb),
        tokenizer=None if tokenizer is None else tokenizer_of(tokenizer),
        vocab_size=vocab_size,
        validation_sources=[validation] if isinstance(validation, str) else validation or [],
        validation_fraction=validation_fraction,
        seed=seed,
        num_proc=num_proc,
        engine=engine,
        overwrite=overwrite,
    )
    print(
        f"{output}: {len(data.train)} training and {len(data.validation)} held-out documents, "
        f"{data.vocab_size} token ids"
    )


def tasks(
    task: str,
    hops: int,
    number: int,
    output: str,
    seed: int = 0,
    held_out: bool = False,
    overwrite: bool = False,
) -> None:
    """Generate multi-step questions with their steps and answers, to fine-tune on.

    Args:
        task: chain (the value of a variable modulo 7), graph (which node is reachable) or path (its end).
        hops: Steps to the answer.
        number: Number of questions.
        output: Output file, .jsonl.
        seed: Seed of the questions.
        held_out: Generate questions reserved for scoring; without this, no seed gives them.
        overwrite: Replace the file.
    """
    SEEDS.require("seed", seed)
    Range(1, 10**8).require("number", number)
    from calm.data.tasks import write_items
    from calm.storage.folders import check_file

    path = Path(output)
    check_file(path, overwrite)
    if path.suffix.lower() != ".jsonl":  # finetune would read it as another format.
        raise InputError(f"the output must be a .jsonl file, got '{output}'.")
    write_items(path, task, hops, seed, number, held_out)
    print(f"{number:,} items: {path}")


def train_model(recipe: Recipe, output: str, resume: bool = False, overwrite: bool = False) -> None:
    """Train a recipe: prepare the text, train the autoencoder, then the language model.

    Args:
        recipe: The recipe.
        output: Folder of the run.
        resume: Resume the run in that folder with the recipe there; with more steps, extend it.
        overwrite: Replace what is in that folder.

    Examples:
        calm train --recipe laptop_quick --data.sources texts/ --output runs/a
        calm train --recipe my.yaml --language_model.num_layers 6 --output runs/b
        calm train --resume --output runs/a
        calm train --resume --output runs/a --language_model.training.steps 9000
    """
    from calm.results import show_results_once
    from calm.training.stages import train as run

    _run_recipe(recipe, output, resume, overwrite, command="train", run=run, show=show_results_once)


def finetune_model(
    recipe: FinetuningRecipe, output: str, resume: bool = False, overwrite: bool = False
) -> None:
    """Fine-tune a model on prompts with completions, or on conversations, in full or with LoRA.

    Args:
        recipe: The recipe.
        output: Folder of the run.
        resume: Resume the run in that folder with the recipe there; with more steps, extend it.
        overwrite: Replace what is in that folder.

    Examples:
        calm finetune --model runs/a --examples.sources qa.jsonl --output runs/c
        calm finetune --resume --output runs/c --training.steps 600
    """
    from calm.results import show_answers
    from calm.training.finetuning import finetune as run

    _run_recipe(recipe, output, resume, overwrite, command="finetune", run=run, show=show_answers)


def _run_recipe(
    recipe: Recipe | FinetuningRecipe,
    output: str,
    resume: bool,
    overwrite: bool,
    *,
    command: str,
    run: Callable[..., Path],
    show: Callable[[Path], None],
) -> None:
    """Run a recipe and show its results. If the run stops, print the command that resumes it."""
    from calm.training.continuing import with_inherited_parts
    from calm.training.processes import processes
    from calm.training.recipe_files import differences, read_recipe_of
    from calm.training.recipe_settings import recipe_file_of_run

    try:
        model = run(recipe, Path(output), resume=resume, overwrite=overwrite)
        if processes().is_main_process:
            print(f"model:  {model}")
        show(Path(output))
    except (KeyboardInterrupt, Terminated, RunError):
        with contextlib.suppress(InputError):  # There may be no run, or one that was to be replaced.
            recorded = read_recipe_of(type(recipe), str(recipe_file_of_run(Path(output))))
            requested = with_inherited_parts(recipe) if isinstance(recipe, Recipe) else recipe
            if not differences(recorded, requested):
                logger.warning("to resume, run: calm %s --resume --output %s", command, shlex.quote(output))
        raise


def compare(
    runs: list[str] | None = None,
    output: str = "runs/compare",
    recipe: str | None = None,
    chunk_sizes: list[int] | None = None,
    no_baseline: bool = False,
    budget: float = 1.0,
    data: str | None = None,
    context: int | None = None,
    max_blocks: int | None = None,
    temperature: float = 0.5,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Score models on the same text, and compare quality and cost in a table and an HTML report.

    Args:
        runs: Run folders or model folders to compare.
        output: Folder for report.html, report.json, and the runs that are trained.
        recipe: Train this recipe first, at several chunk sizes with equal FLOPs.
        chunk_sizes: These chunk sizes; 1, 2, 4 and 8 by default.
        no_baseline: Train no autoregressive baseline as well.
        budget: Share of the recipe's FLOPs that each of these runs gets.
        data: Prepared folder whose held-out part is scored; that of the first run by default.
        context: Tokens per block; those of the recipe, or 512.
        max_blocks: Maximum number of blocks to score.
        temperature: Low temperature, at which texts are generated and the cost is shown.
        overwrite: Replace an existing report. Runs are never replaced; unfinished ones are resumed.
        json: Print the numbers in report.json instead of the table.
    """
    from calm.comparison.ladder import train_ladder
    from calm.comparison.measures import Measures, compare
    from calm.report.comparison import print_comparison, write_comparison
    from calm.report.panels import new_figure
    from calm.storage.folders import check_file
    from calm.training.recipe_files import read_recipe

    for name, number in (("context", context), ("max_blocks", max_blocks)):
        if number is not None:
            BLOCKS.require(name, number)
    folders = [Path(run) for run in runs or []]
    report = Path(output) / "report.html"
    for file in (report, report.with_suffix(".json")):
        check_file(file, overwrite)
    new_figure(1, 1)  # If matplotlib is missing, fail now, not after hours.
    Measures(low=temperature)
    if recipe is not None:
        ladder = read_recipe(recipe)
        context = context or ladder.data.context
        sizes = [1, 2, 4, 8] if chunk_sizes is None else chunk_sizes
        folders += train_ladder(ladder, sizes, Path(output), baseline=not no_baseline, budget=budget)
    elif not folders:
        raise InputError("name runs to compare, or a --recipe to train.")
    measures = Measures(context=context or 512, num_blocks=max_blocks, low=temperature)
    comparison = compare(folders, Path(data) if data else None, measures)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(comparison, report)
    if json:
        print(report.with_suffix(".json").read_text(encoding="utf-8"), end="")
    else:
        print_comparison(comparison)
        print(f"report: {report}")


def ablate(
    question: str,
    output: str = "runs/ablation",
    recipe: str = "demo",
    seeds: list[int] | None = None,
    only: list[str] | None = None,
    max_blocks: int | None = None,
) -> None:
    """Train a recipe with each of several settings, over several seeds, and tabulate the scores.

    Args:
        question: Shipped name or .yaml file of an ablation: a question, and the settings that answer it.
        output: Folder for the runs and the table. Finished runs are kept, stopped ones are resumed.
        recipe: Base recipe of all runs; if it names no text, the embedded stories are used.
        seeds: Seeds of the runs, such as [1,2,3]; 1 and 2 by default.
        only: Names of the settings to compare; all by default.
        max_blocks: Maximum number of held-out blocks to score.
    """
    from calm.comparison.ablation import read_ablation, run_ablation
    from calm.report.ablation import print_ablation, write_ablation
    from calm.training.recipe_files import read_recipe

    if max_blocks is not None:
        BLOCKS.require("max_blocks", max_blocks)
    folder = Path(output) / Path(question).stem
    table = run_ablation(
        read_ablation(question),
        read_recipe(recipe),
        seeds or [1, 2],
        folder,
        only=only or [],
        num_blocks=max_blocks,
    )
    print_ablation(table)
    write_ablation(table, folder / "ablation.md")
    print(f"table: {folder / 'ablation.md'}")
