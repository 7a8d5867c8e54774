"""The model card of a run of `calm train`: its text, training, and scores on held-out text."""

from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult
from transformers import PreTrainedConfig

from calm.comparison.costs import record_of
from calm.data.prepared import load_prepared
from calm.evaluation.held_out import Scorecard, score_model
from calm.models.loading import load_language_model_and_tokenizer
from calm.quantities import duration
from calm.report.tables import BRIER_COLUMNS, cells_of, costs_exclude, perplexities_of, rows_of
from calm.sharing.card import CardDetails, card_of, public_name, repository_of
from calm.training.blocks import block_settings
from calm.training.opening import prepare_text
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, read_recipe
from calm.training.teacher import read_teacher_facts


def card_of_training(run: Path, details: CardDetails, ngrams: list[int], num_blocks: int | None) -> str:
    """Score the model of a run on its held-out text, and return its model card.

    Args:
        run: Folder of the run.
        details: Name, license, and a paragraph.
        ngrams: Orders of the n-gram floors.
        num_blocks: Maximum number of held-out blocks to score.
    """
    recipe = read_recipe(str(run / RECIPE))
    model, _ = load_language_model_and_tokenizer(str(run / "model"))
    data = load_prepared(prepare_text(recipe, run))
    scorecard = score_model(model, data, block_settings(recipe), ngrams=ngrams, num_blocks=num_blocks)
    sources = [public_name(source) for source in recipe.data.source_list]
    metric = "brier_1" if scorecard.brier.undefined else "brier_lm"
    result = EvalResult(
        task_type="text-generation",
        dataset_type="held-out text",
        dataset_name=", ".join(sources),
        metric_type=metric,
        metric_name={"brier_lm": "BrierLM", "brier_1": "Brier-1"}[metric],
        metric_value=round(scorecard.brier.as_metrics()[metric], 3),
    )
    sections = {
        "Data": _data(run, recipe, sources),
        "Training": _training(run, recipe, model.config),
        "Evaluation": _evaluation(scorecard, recipe),
    }
    source = recipe.language_model.init_from
    base = None if source is None else repository_of(source)
    return card_of(run, model, details, sections, [result], base_model=base)


def _data(run: Path, recipe: Recipe, sources: list[str]) -> str:
    counts = load_prepared(prepare_text(recipe, run)).counts()
    prefix = "Text was streamed; of a sample of it there were " if recipe.data.streaming else ""
    held_out = recipe.data.validation_source_list
    split = f"from {', '.join(map(public_name, held_out))}" if held_out else "equal documents together"
    return f"{', '.join(sources)}. {prefix}{counts}, {split}."


def _training(run: Path, recipe: Recipe, config: PreTrainedConfig) -> str:
    training, lines = recipe.language_model.training, list[str]()
    if (source := recipe.language_model.init_from) is not None:
        lines.append(f"It began with the weights of {public_name(source)}.")
    if recipe.trains_autoencoder:
        stage = recipe.autoencoder.training
        lines.append(f"Autoencoder: {stage.steps:,} steps of {stage.batch_tokens:,} tokens.")
    lines.append(
        f"Language model: {training.steps:,} steps of {training.batch_tokens:,} tokens, in blocks of "
        f"{recipe.data.context}, with {training.optimizer.name}."
    )
    if (teacher := read_teacher_facts(run)) is not None:
        teacher = replace(teacher, model=public_name(teacher.model))
        settings = recipe.language_model.teacher
        states = f", states {settings.states:g}" if settings.states else ""
        lines.append(
            f"It learned from the teacher {teacher}: weight {settings.weight:g}, "
            f"temperature {settings.temperature:g}{states}."
        )
    if (record := record_of(run, config)) is not None:
        line = f"Together {record.flops:.2e} FLOPs by count"
        if record.seconds is not None:
            line += f"; {duration(record.seconds)}, held-out evaluations included"
        lines += [f"{line}.", *costs_exclude([("this run", record.excluded)])]
    return "\n".join(lines)


def _evaluation(scorecard: Scorecard, recipe: Recipe) -> str:
    rows = [f"| | {' | '.join(BRIER_COLUMNS)} |", "|---" * (len(BRIER_COLUMNS) + 1) + "|"]
    for name, result in rows_of(scorecard):
        cells = " | ".join(cell.replace("±", " ± ") for cell in cells_of(result))
        rows.append(f"| {name} | {cells} |")
    brier = scorecard.brier
    protocol = (
        f"Held-out text, T = 1, {brier.num_chunks:,} chunks in blocks of {brier.context} tokens "
        f"(layout {scorecard.layout}), percent ± standard error over documents, training seed "
        f"{recipe.seed}. Scores of other contexts or tokenizers do not compare."
    )
    parts = ["\n".join(rows), protocol]
    if scorecard.reconstruction is not None:
        parts.append(
            f"The autoencoder reconstructs {scorecard.reconstruction.token_accuracy:.2%} of held-out tokens."
        )
    if scorecard.perplexity is not None:
        floors = perplexities_of(scorecard.floor_perplexities)
        parts.append(f"Perplexity {scorecard.perplexity.perplexity:.3f} a token{floors}.")
    return "\n\n".join(parts)
