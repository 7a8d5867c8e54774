"""BrierLM and nats against training FLOPs: does a CALM keep its lead over the Transformer?

    python benchmarks/ladder.py --train train.jsonl.xz --valid valid.jsonl.xz --output runs/ladder \
        --results benchmarks/results/ladder --budgets 5e13 2e14

For each budget of training FLOPs, models of several widths are trained: Transformers, and CALMs with the
sequential head (`laptop`), with one softmax and with classes of tokens. (With chunks of a single token, that
is a Transformer with classes.) The width with the fewest nats per token on `--valid` is chosen, once both of
its neighbours have been tried. Only models of that width are scored, on three books that nothing else uses:
they are removed from `--train` (`HELD_BACK`). Further seeds are trained at the chosen width only.

Finished runs and results are kept, so an interrupted benchmark resumes. Without `--output`, the table and the
figure are made from existing results.
"""

import argparse
import dataclasses
import json
import lzma
from pathlib import Path
from typing import Any, NamedTuple

from ladder_table import draw, report
from measure import brier_scores, json_rows, machine, rows_of
from prose import CONTEXT, SEED, with_budget

from calm.comparison.costs import record_of
from calm.comparison.ladder import at_chunk_size
from calm.data.prepare import prepare
from calm.data.prepared import PreparedData, load_prepared
from calm.evaluation.held_out import (
    ngram_models,
    score_ngrams_brier,
    score_ngrams_perplexity,
    score_perplexity,
    score_with,
)
from calm.evaluation.scorers import scorer_of
from calm.flops import Work, cost_of
from calm.models.loading import load_language_model_and_tokenizer
from calm.storage.disk import write_atomically
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, read_recipe
from calm.training.stages import train

HELD_BACK = (
    "bram-stoker_dracula",
    "thomas-hardy_tess-of-the-durbervilles",
    "h-g-wells_the-war-of-the-worlds",
)
"""Books for the final scores; the training text has no others by their authors."""

CHUNK_SIZES = {
    "baseline": 1,
    "sequential_K2": 2,
    "sequential_K4": 4,
    "sequential_K8": 8,
    "classes_K2": 2,
    "classes_K4": 4,
    "classes_K1": 1,
}
NUM_CLASSES = dict.fromkeys(("classes_K1", "classes_K2", "classes_K4"), 64)
WIDTHS = (64, 96, 128, 192, 256, 384, 512)
FIRST_WIDTHS = {5e12: (64,), 1e13: (64,), 2e13: (64,), 5e13: (96, 128), 2e14: (128, 192), 1e15: (256, 384)}
"""Widths that are tried first, by budget. A single one was found on the same text before (docs/log.md,
"The right size for a budget"), so no others are tried."""
LARGE_BUDGET = 2e14
"""Training FLOPs from which a step reads twice as many tokens."""
Result = dict[str, Any]


class Run(NamedTuple):
    """A model to train.

    Args:
        kind: A key of `CHUNK_SIZES`.
        budget: Training FLOPs.
        width: Hidden size.
        seed: Seed of the weights and of the order of the text.
    """

    kind: str
    budget: float
    width: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and of its file of results."""
        return f"{self.kind}_{self.budget:.0e}_w{self.width}_seed{self.seed}".replace("+", "")


def main() -> None:
    """Train, choose and score whatever is missing, then print the tables and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, default=Path("train.jsonl.xz"), help="training text")
    parser.add_argument("--valid", default="valid.jsonl.xz", help="text that widths are chosen on")
    parser.add_argument("--output", type=Path, help="folder of text and runs; without, nothing is trained")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/ladder")
    parser.add_argument("--kinds", nargs="*", default=list(CHUNK_SIZES), choices=list(CHUNK_SIZES))
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=list(FIRST_WIDTHS), choices=list(FIRST_WIDTHS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--figure", type=Path, help="where the figure is drawn, a PNG")
    arguments = parser.parse_args()
    if arguments.output:
        output, results = arguments.output.resolve(), arguments.results
        write_text(arguments.train, arguments.valid, output, arguments.vocab_size)
        floor = results / "floor.json"
        if not floor.exists():
            save(floor, score_floor(output))
        for budget in sorted(arguments.budgets):
            for kind in arguments.kinds:
                search_width(kind, budget, arguments.seeds, output, results)
    if arguments.results.is_dir():
        rows = [json.loads(file.read_text()) for file in sorted(arguments.results.glob("*_seed*.json"))]
        print(report(rows, json.loads((arguments.results / "floor.json").read_text())))
        if arguments.figure:
            draw(rows, arguments.figure)


def search_width(kind: str, budget: float, seeds: list[int], output: Path, results: Path) -> None:
    """Choose the best width with the first seed, and score all seeds at that width."""
    first_seed = seeds[0]
    nats: dict[int, float] = {}
    missing: tuple[int, ...] = FIRST_WIDTHS[budget]
    while missing:  # Until both neighbours of the best width have been tried.
        for width in missing:
            nats[width] = run(Run(kind, budget, width, first_seed), output, results)["nats_to_choose_by"]
        chosen = min(nats, key=nats.__getitem__)
        index = WIDTHS.index(chosen)
        neighbours = WIDTHS[max(0, index - 1) : index + 2]
        missing = tuple(width for width in neighbours if width not in nats) if len(nats) > 1 else ()
    for seed in seeds:
        settings = Run(kind, budget, chosen, seed)
        result = run(settings, output, results)
        if "brier_lm" not in result:
            save(results / f"{settings.name}.json", result | score(output / settings.name, output))


def run(settings: Run, output: Path, results: Path) -> Result:
    """Train a model; return its settings, its cost, and its nats on the text that widths are chosen on."""
    file, folder = results / f"{settings.name}.json", output / settings.name
    if file.exists():
        result: Result = json.loads(file.read_text())
        return result
    recipe = recipe_of(settings, output / "data")
    print(f"{settings.name}: {recipe.language_model.training.steps:,} steps", flush=True)
    train(recipe, folder, resume=(folder / RECIPE).is_file())
    model, _ = load_language_model_and_tokenizer(str(folder / "model"))
    record = record_of(folder, model.config)
    assert record is not None
    data = load_prepared(output / "data")
    size = CHUNK_SIZES[settings.kind]
    cost = cost_of(model.config, Work(CONTEXT // size, 1))
    result = {
        **settings._asdict(),
        "training_flops": record.flops,
        "seconds": record.seconds,
        "steps": recipe.language_model.training.steps,
        "training_tokens": recipe.language_model.training.tokens,
        "parameters": sum(cost.parameters.values()),
        "inference_flops": sum(cost.inference.values()),
        "nats_to_choose_by": nats_of(model, data),
        "machine": machine(),
    }
    save(file, result)
    return result


def recipe_of(settings: Run, data: Path) -> Recipe:
    """The recipe of a model, with as many steps as its budget allows."""
    size = CHUNK_SIZES[settings.kind]
    recipe = at_chunk_size(read_recipe("laptop"), size)
    model = recipe.language_model
    training = dataclasses.replace(
        model.training, batch_tokens=2048 if size > 1 else 1024, evaluate_every=0, evaluation_blocks=8
    )
    head = model.head | {"rank": settings.width // 2}
    if settings.kind in NUM_CLASSES:
        head["num_classes"] = NUM_CLASSES[settings.kind]
    if settings.width > 128 or settings.budget >= LARGE_BUDGET:
        training = dataclasses.replace(training, batch_tokens=2 * training.batch_tokens)
    model = dataclasses.replace(
        model,
        hidden_size=settings.width,
        intermediate_size=round(settings.width * 2.75),
        num_heads=max(2, settings.width // 64),
        num_layers=4 if settings.width <= 128 else 6,
        head=head,
        training=training,
    )
    text = dataclasses.replace(recipe.data, sources=[str(data)], context=CONTEXT)
    recipe = dataclasses.replace(recipe, seed=settings.seed, data=text, language_model=model)
    if settings.kind == "baseline":
        recipe = dataclasses.replace(recipe, model="autoregressive")
    return with_budget(recipe, settings.budget)


def score(folder: Path, output: Path) -> Result:
    """Nats per token and BrierLM of a trained model on the books held back."""
    model, _ = load_language_model_and_tokenizer(str(folder / "model"))
    data, scorer = load_prepared(output / "held_back"), scorer_of(model)
    blocks = data.blocks("validation", chunk_size=scorer.chunk_size, block_size=CONTEXT)
    brier = score_with(scorer, model, blocks, None, SEED, 8)
    assert brier.documents is not None
    return {
        "nats": nats_of(model, data),
        **brier_scores(brier),
        "documents": rows_of(brier.documents),
    }


def nats_of(model: Any, data: PreparedData) -> float:
    """Cross-entropy per token on held-out text."""
    blocks = data.blocks("validation", chunk_size=scorer_of(model).chunk_size, block_size=CONTEXT)
    return score_perplexity(model, blocks).cross_entropy


def score_floor(output: Path) -> Result:
    """Scores of n-gram models of the training text on the books held back."""
    data, held_back = load_prepared(output / "data"), load_prepared(output / "held_back")
    blocks = held_back.blocks("validation", chunk_size=4, block_size=CONTEXT)
    floors = {}
    for name, ngrams in ngram_models([2, 3, 4], data, 4):
        brier = score_ngrams_brier(ngrams, blocks)
        error = brier.brier_lm_error if brier.brier_lm else None
        nats = score_ngrams_perplexity(ngrams, blocks).cross_entropy
        floors[name] = brier_scores(brier) | {"error": error, "nats": nats}
    return floors


def write_text(train_file: Path, valid: str, output: Path, vocab_size: int) -> None:
    """Prepare the training text, the text that widths are chosen on, and the books held back."""
    if (output / "held_back").is_dir():
        return
    output.mkdir(parents=True, exist_ok=True)
    with lzma.open(train_file, "rt", encoding="utf-8") as file:
        rows = [(json.loads(line)["source"] in HELD_BACK, line) for line in file]
    texts = {name: output / f"{name}.jsonl" for name in ("train", "held_back")}
    for name, path in texts.items():
        lines = [line for is_held_back, line in rows if is_held_back == (name == "held_back")]
        write_atomically(path, "".join(lines))
    if not (output / "data").is_dir():
        prepare([str(texts["train"])], output / "data", validation_sources=[valid], vocab_size=vocab_size)
    prepare(
        [valid],
        output / "held_back",
        validation_sources=[str(texts["held_back"])],
        tokenizer=str(output / "data/tokenizer"),
    )


def save(file: Path, result: Result) -> None:
    """Write a result."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json_rows(result) + "\n")


if __name__ == "__main__":
    main()
