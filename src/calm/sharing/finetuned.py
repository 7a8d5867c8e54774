"""The model card of a run of `calm finetune`: base model, examples, and answers."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from calm.evaluation.answers import metric_of_answers
from calm.models.loading import load_language_model_and_tokenizer
from calm.models.shipped import shipped_models
from calm.sharing.card import CardDetails, card_of, public_name, repository_of
from calm.storage.disk import read_json, read_json_lines
from calm.training.finetuning import ANSWERS, COUNTS
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe_files import RECIPE, read_recipe_of
from calm.training.runs import HISTORY

_SAMPLES = 3
_LONGEST_SAMPLE = 600  # Characters shown of a prompt, from its end.


def card_of_finetuning(run: Path, details: CardDetails) -> str:
    """The model card of a fine-tuned model, with the scores that its run recorded.

    Args:
        run: Folder of the run.
        details: Name, license, and a paragraph.

    Raises:
        InputError: If a file of the run is damaged.
    """
    recipe = read_recipe_of(FinetuningRecipe, str(run / RECIPE))
    model, _ = load_language_model_and_tokenizer(str(run / "model"))
    answers = read_json_lines(run / ANSWERS) if (run / ANSWERS).is_file() else []
    history = read_json(run / HISTORY, list) if (run / HISTORY).is_file() else []
    sources = ", ".join(map(public_name, recipe.examples.source_list))
    results = []
    if answers:
        metric, percent = _score(answers, "after", recipe)
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out examples",
                dataset_name=sources,
                metric_type=metric,
                metric_name=metric.replace("_", " ").capitalize(),
                metric_value=round(percent, 2),
            )
        )
    sections = {
        "Base model": _base_model(recipe),
        "Data": _data(run, recipe, sources),
        "Training": _training(run, recipe),
        "Evaluation": _evaluation(history, answers, recipe),
    }
    return card_of(
        run,
        model,
        details,
        sections,
        results,
        prompt=answers[0]["prompt"] if answers else "Once upon a time",
        tags=("fine-tuned",),
        base_model=repository_of(recipe.model),
    )


def _base_model(recipe: FinetuningRecipe) -> str:
    origin = " (a model of the package)" if recipe.model in shipped_models() else ""
    return f"{public_name(recipe.model)}{origin}, fine-tuned."


def _data(run: Path, recipe: FinetuningRecipe, sources: str) -> str:
    counts = read_json(run / COUNTS, dict) if (run / COUNTS).is_file() else {}
    numbers = (
        f" {counts['examples']:,} examples to train on ({counts['shortened']:,} shortened to fit in "
        f"{recipe.examples.context} tokens), {counts['held_out']:,} held out."
        if counts
        else ""
    )
    held_out = ", ".join(map(public_name, recipe.examples.validation_source_list))
    split = f" Held-out examples: {held_out}." if held_out else " Held out by prompts: equal ones together."
    return f"{sources}.{numbers}{split}"


def _training(run: Path, recipe: FinetuningRecipe) -> str:
    training, lora = recipe.training, recipe.lora
    trained = f"low-rank adapters of rank {lora.rank} ({lora.layers})" if lora.rank else "all weights"
    merged = " The model here has them added to its weights." if (run / "adapter").is_dir() else ""
    return (
        f"{training.steps:,} steps of {training.batch_tokens:,} tokens, in blocks of "
        f"{recipe.examples.context}, with {training.optimizer.name}: {trained}.{merged}"
    )


def _evaluation(
    history: list[dict[str, Any]], answers: list[dict[str, str]], recipe: FinetuningRecipe
) -> str:
    losses = [entry["eval_held_out_loss"] for entry in history if "eval_held_out_loss" in entry]
    parts = [f"Loss on held-out completions: {losses[-1]:.4g}."] if losses else []
    if answers:
        before, after = (_score(answers, when, recipe)[1] for when in ("before", "after"))
        phrase = "with words that end with" if _writes_steps(recipe) else "with"
        parts.append(
            f"Of {len(answers)} held-out prompts, {before:.0f}% were answered {phrase} the expected "
            f"completion before, {after:.0f}% after (temperature {recipe.answers.temperature:g}, seed "
            f"{recipe.seed}; white space at the ends does not count)."
        )
    samples = [
        f"```text\n{row['prompt'][-_LONGEST_SAMPLE:]}\n```\n\n"
        f"- expected: {_quoted(row['completion'])}\n- before: {_quoted(row['before'])}\n"
        f"- after: {_quoted(row['after'])}"
        for row in answers[:_SAMPLES]
    ]
    return "\n\n".join([*parts, *samples]) or "The run was not scored."


def _score(answers: list[dict[str, str]], when: str, recipe: FinetuningRecipe) -> tuple[str, float]:
    """The metric that the run was scored by, and its value for the answers before or after training."""
    name, metric = metric_of_answers(may_begin_with_steps=_writes_steps(recipe))
    return name, metric([row[when] for row in answers], [row["completion"] for row in answers])


def _writes_steps(recipe: FinetuningRecipe) -> bool:
    """Whether steps may precede the completion of an answer."""
    return recipe.thoughts.mode != "none"


def _quoted(text: str) -> str:
    return json.dumps(text.strip(), ensure_ascii=False)
