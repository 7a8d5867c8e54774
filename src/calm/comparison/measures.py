"""Scores, costs and samples of several models on the same held-out text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from calm.comparison.costs import blocks_of_run, recipe_of_run, record_of
from calm.core.brier import NUM_ORDERS
from calm.core.samplers import ExactSampler
from calm.data.chunking import BlockSettings
from calm.data.prepared import PreparedData, is_prepared, load_prepared
from calm.errors import InputError
from calm.evaluation.held_out import (
    EVALUATION_SEED,
    affordable_orders,
    ngram_models,
    score_model,
    score_ngrams_brier,
    score_with,
)
from calm.evaluation.scorers import scorer_of
from calm.flops import Work, cost_of
from calm.models.language_model import language_model
from calm.models.loading import load_language_model_and_tokenizer
from calm.progress import announce, track
from calm.report.facts import here_and_now
from calm.report.measured import Comparison, ModelResult, TemperaturePoint
from calm.texts import continue_texts
from calm.training.recipe_files import RECIPE

_TEMPERATURE_SEED = 7


@dataclasses.dataclass(frozen=True)
class Measures:
    """What to measure for each model.

    Args:
        context: Tokens per block.
        num_blocks: Number of held-out blocks to score; all if None.
        temperatures: Temperatures at which to measure accuracy and collision; 1 is always included.
        low: Temperature of the continuations and of the reported cost.
        warm_blocks: Number of held-out blocks on which accuracy and collision are measured.
        num_texts: Number of held-out texts whose beginnings every model continues.
        text_tokens: Tokens per continuation.
        ngrams: Orders of the n-gram floors.
    """

    context: int = 512
    num_blocks: int | None = None
    temperatures: tuple[float, ...] = (1.0, 0.8, 0.65, 0.5, 1 / 3, 0.25)
    low: float = 0.5
    warm_blocks: int = 8
    num_texts: int = 3
    text_tokens: int = 80
    ngrams: tuple[int, ...] = (3, 5)

    def __post_init__(self) -> None:
        if not 0 < self.low <= 1:
            raise InputError(f"temperature must be above 0 and at most 1, got {self.low:g}.")
        try:
            ExactSampler(temperature=self.low)
        except ValueError as error:  # Too low for the maximum number of draws.
            raise InputError(str(error)) from error

    @property
    def all_temperatures(self) -> list[float]:
        """All temperatures, from 1 down."""
        return sorted({1.0, self.low, *self.temperatures}, reverse=True)


def compare(runs: Sequence[Path], data: Path | None, measures: Measures) -> Comparison:
    """Score models on the same held-out text, laid out as by the recipe of the first run if it has one.

    Args:
        runs: Folders of runs, or model folders (without training costs).
        data: Prepared text; that of the first run if None.
        measures: What to measure.

    Raises:
        InputError: If a folder is neither, names repeat, or a model's tokenizer is not that of the text.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise InputError(f"a comparison needs runs with different names, got: {', '.join(names) or 'none'}.")
    prepared = _open_data(runs[0], data)
    prompts = [beginning for beginning, _ in prepared.held_out_beginnings(measures.num_texts)]
    settings = dataclasses.replace(blocks_of_run(runs[0], measures.context), block_size=measures.context)
    results = [
        _measure(run, prepared, settings, prompts, measures)
        for run in track(runs, "comparing", "model", stays=True)
    ]
    blocks = prepared.blocks("validation", chunk_size=NUM_ORDERS, **dataclasses.asdict(settings))
    orders = affordable_orders(measures.ngrams, prepared)
    floors = {
        name: score_ngrams_brier(ngrams, blocks, measures.num_blocks)
        for name, ngrams in ngram_models(orders, prepared, NUM_ORDERS)
    }
    counts = [result.card.brier.num_chunks for result in results]
    windows = f"{min(counts):,} to {max(counts):,}" if len(set(counts)) > 1 else f"{counts[0]:,}"
    protocol = f"Held-out text in {settings}, {windows} windows, T = 1, percent ± standard error"
    return Comparison(results, floors, measures.low, prompts, protocol, here_and_now())


def _measure(
    run: Path, data: PreparedData, settings: BlockSettings, prompts: list[str], measures: Measures
) -> ModelResult:
    folder = run / "model" if (run / "model").is_dir() else run
    model, tokenizer = load_language_model_and_tokenizer(str(folder))
    if tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise InputError(f"'{run}' has a different tokenizer than the text; compare models that share one.")
    view = language_model(model)
    size = view.chunk_size
    cost = cost_of(model.config, Work(measures.context // size))  # First: it rejects models it cannot count.
    announce(f"scoring {run.name}")
    card = score_model(model, data, settings, num_blocks=measures.num_blocks)
    record = record_of(run, model.config)
    return ModelResult(
        name=run.name,
        chunk_size=size,
        head=view.head_type,
        parameters=sum(cost.parameters.values()),
        card=card,
        training_flops=record.flops if record else None,
        seconds=record.seconds if record else None,
        checkpoints=record.checkpoints if record else [],
        temperature_points=[
            _temperature_point(model, data, settings, t, measures.warm_blocks)
            for t in measures.all_temperatures
        ],
        texts=continue_texts(
            model,
            tokenizer,
            prompts,
            at_most=measures.text_tokens,
            temperature=measures.low,
            seed=EVALUATION_SEED,
            crop=True,
        ),
        excluded=record.excluded if record else (),
        recipe=(run / RECIPE).read_text(encoding="utf-8") if (run / RECIPE).is_file() else None,
    )


def _temperature_point(
    model: PreTrainedModel, data: PreparedData, settings: BlockSettings, temperature: float, num_blocks: int
) -> TemperaturePoint:
    scorer = scorer_of(model, temperature=temperature)
    blocks = data.blocks("validation", chunk_size=scorer.chunk_size, **dataclasses.asdict(settings))
    label = f"drawing at T = {temperature:.2g}"
    result = score_with(scorer, model, blocks, num_blocks, _TEMPERATURE_SEED, label=label)
    mean_draws = scorer.reader.mean_draws
    chunks = settings.block_size // language_model(model).chunk_size
    cost = cost_of(model.config, Work(chunks, mean_draws))
    return TemperaturePoint(
        temperature,
        result.hits[:NUM_ORDERS],
        result.collisions[:NUM_ORDERS],
        mean_draws,
        sum(cost.inference.values()),
    )


def _open_data(run: Path, data: Path | None) -> PreparedData:
    if data is not None:
        return load_prepared(data)
    if is_prepared(run / "data"):
        return load_prepared(run / "data")
    if (recipe := recipe_of_run(run)) is not None:
        sources = recipe.data.source_list
        if len(sources) == 1 and is_prepared(Path(sources[0])):
            return load_prepared(Path(sources[0]))
    raise InputError(f"'{run}' contains no prepared text; pass it with --data.")
