"""Can a CALM write real prose, and is it better than a Transformer of equal total cost?

    python benchmarks/prose.py --train train.jsonl.xz --valid valid.jsonl.xz --output runs/prose

For each seed and each budget of training FLOPs, one model of each kind is trained on the same text with the
same tokenizer, optimizer and context, and scored on the same held-out text. Widths (`MODELS`) suit these
budgets, as far as they were tuned.

    baseline          a Llama of tokens
    energy_K4         CALM as published, except for Muon and the integrated posterior (`laptop_energy`);
                      its autoencoder takes more FLOPs than most of these budgets, so it is trained in full,
                      once for all budgets of a seed, and is not counted
    energy_K2         the same with chunks of two tokens
    categorical_K4    the categorical flow head, which draws four tokens at once (recipe `laptop_categorical`)
    sequential_K4     the sequential head, one token after another (recipe `laptop_quick`)
    sequential_K2     the same with chunks of two tokens

Finished runs and results are kept, so an interrupted benchmark resumes; once the text is prepared, runs of
several seeds may share an output folder at the same time. `--models` without a name trains nothing, so this
makes the table and the figure of the documentation:

    python benchmarks/prose.py --results benchmarks/results/prose --models
"""

import argparse
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.ticker import NullFormatter
from measure import brier_scores, json_rows, rows_of, sums_of
from transformers import PreTrainedTokenizerBase

from calm.comparison.costs import affordable_steps, record_of
from calm.comparison.ladder import at_chunk_size
from calm.core.brier import brier_lm_difference
from calm.data.prepare import prepare
from calm.data.prepared import PreparedData, load_prepared
from calm.errors import InputError
from calm.evaluation.held_out import (
    ngram_models,
    score_ngrams_brier,
    score_perplexity,
    score_reconstruction,
    score_with,
)
from calm.evaluation.scorers import scorer_of
from calm.flops import Work, cost_of
from calm.models.calm import CalmForCausalLM
from calm.models.language_model import language_model
from calm.models.loading import load_language_model_and_tokenizer
from calm.report.panels import new_figure
from calm.report.tables import with_error
from calm.storage.disk import write_atomically
from calm.texts import continue_tokens
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, read_recipe
from calm.training.stages import train, train_autoencoder


class Kind(NamedTuple):
    """A kind of model: its recipe, and settings tuned for this text and these budgets (docs/log.md)."""

    label: str
    recipe: str
    chunk_size: int
    width: int
    batch: int  # Tokens per step.


MODELS = {
    "baseline": Kind("Transformer", "laptop_quick", 1, 64, 1024),
    "energy_K4": Kind("energy head, K = 4, autoencoder free", "laptop_energy", 4, 64, 1024),
    "energy_K2": Kind("energy head, K = 2, autoencoder free", "laptop_energy", 2, 64, 1024),
    "categorical_K4": Kind("categorical flow head, K = 4", "laptop_categorical", 4, 64, 1024),
    "sequential_K4": Kind("sequential head, K = 4", "laptop_quick", 4, 64, 2048),
    "sequential_K2": Kind("sequential head, K = 2", "laptop_quick", 2, 64, 2048),
}
CONTEXT = 512
FLOOR = "floor.json"
Result = dict[str, Any]  # A model's settings, cost and scores, as saved in a file.
LOW = 0.5  # A temperature of fluent text.
WARM_BLOCKS, SEED = 16, 1234
NUM_DRAWS = 8  # Per chunk at T = 1, for models without probabilities.
PROMPT, NUM_PROMPTS = 96, 2048  # Tokens and number of prompts for the share of well-formed chunks.


def main() -> None:
    """Train and score whatever is missing, then print the table and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", default="train.jsonl.xz", help="training text")
    parser.add_argument("--valid", default="valid.jsonl.xz", help="held-out text")
    parser.add_argument("--output", type=Path, default=Path("runs/prose"))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[5e12, 1e13, 2e13])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--blocks", type=int, help="held-out blocks that are scored, all by default")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument(
        "--results", type=Path, help="folder of the results, in that of the output by default"
    )
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    results = arguments.results or output / "results"
    if not arguments.models and not (results / FLOOR).is_file() and arguments.results:
        parser.error(f"there are no results in '{results}' (no {FLOOR}).")
    results.mkdir(parents=True, exist_ok=True)
    if arguments.models or not (results / FLOOR).is_file():
        if not (output / "data").is_dir():
            try:
                prepare(
                    [arguments.train],
                    output / "data",
                    validation_sources=[arguments.valid],
                    vocab_size=arguments.vocab_size,
                )
            except InputError as error:
                parser.error(str(error))
        if not (results / FLOOR).is_file():
            write(results / FLOOR, score_floor(output / "data", CONTEXT, arguments.blocks))
    for seed in arguments.seeds:
        for budget in sorted(arguments.budgets):
            for name in arguments.models:
                result = results / f"{name}_{budget:.3g}_seed{seed}.json"
                if not result.is_file():
                    write(result, run(name, budget, seed, output, arguments.blocks))
    report(results)


def write(path: Path, value: dict[str, Any]) -> None:
    """Save a result."""
    write_atomically(path, json_rows(value) + "\n")


def run(name: str, budget: float, seed: int, output: Path, num_blocks: int | None) -> Result:
    """Train and score one model; return its settings, cost and scores."""
    folder = output / f"{name}_{budget:.3g}_seed{seed}"
    recipe = recipe_of(name, seed, output / "data")
    if recipe.trains_autoencoder:
        recipe = with_autoencoder(recipe, output / f"autoencoder_{name}_seed{seed}")
    recipe = with_budget(recipe, budget)
    print(f"{folder.name}: {recipe.language_model.training.steps} steps", flush=True)
    is_resumed = (folder / RECIPE).is_file() and not (folder / "model").is_dir()
    train(recipe, folder, resume=(folder / RECIPE).is_file())
    scores = score(folder, recipe.data.context, num_blocks)
    if is_resumed:
        scores["seconds"] = math.nan  # Only the time after resuming is known.
    return {"model": name, "budget": budget, "seed": seed, **scores, "words": score_words(folder)}


def recipe_of(name: str, seed: int, data: Path) -> Recipe:
    """The recipe of a model, for any budget."""
    kind = MODELS[name]
    recipe = at_chunk_size(read_recipe(kind.recipe), kind.chunk_size)
    training = dataclasses.replace(
        recipe.language_model.training, batch_tokens=kind.batch, evaluate_every=0, evaluation_blocks=8
    )
    model = dataclasses.replace(
        recipe.language_model,
        hidden_size=kind.width,
        intermediate_size=round(kind.width * 2.75),
        num_heads=max(2, kind.width // 64),
        training=training,
    )
    text = dataclasses.replace(recipe.data, sources=[str(data)], context=CONTEXT)
    recipe = dataclasses.replace(recipe, seed=seed, data=text, language_model=model)
    return dataclasses.replace(recipe, model="autoregressive") if name == "baseline" else recipe


def with_autoencoder(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with an autoencoder from a folder, where it is trained first if it is missing."""
    path = train_autoencoder(recipe, folder, resume=(folder / RECIPE).is_file())
    return dataclasses.replace(recipe, autoencoder=dataclasses.replace(recipe.autoencoder, path=str(path)))


def with_budget(recipe: Recipe, budget: float) -> Recipe:
    """The recipe with as many steps as a budget of FLOPs allows; an existing autoencoder costs nothing."""
    steps = affordable_steps(recipe, load_prepared(Path(recipe.data.sources[0])).vocab_size, budget)
    training = dataclasses.replace(recipe.language_model.training, steps=steps)
    model = dataclasses.replace(recipe.language_model, training=training)
    return dataclasses.replace(recipe, language_model=model)


def score(folder: Path, context: int, num_blocks: int | None) -> Result:
    """Quality and cost of a trained model."""
    model, _ = load_language_model_and_tokenizer(str(folder / "model"))
    data = load_prepared(folder.parent / "data")
    size = model.config.chunk_size if isinstance(model, CalmForCausalLM) else 1
    record = record_of(folder, model.config)
    assert record is not None and record.seconds is not None
    result: Result = {
        "training_flops": record.flops,
        "seconds": record.seconds,
        "steps": read_recipe(str(folder / RECIPE)).language_model.training.steps,
        "parameters": sum(cost_of(model.config).parameters.values()),
    }
    if isinstance(model, CalmForCausalLM):
        blocks = data.blocks("validation", chunk_size=size, block_size=context)
        reconstruction = score_reconstruction(model.autoencoder, blocks, num_blocks)
        result["given_back"] = reconstruction.token_accuracy
    if language_model(model).has_likelihood:
        width = scorer_of(model).chunk_size
        blocks = data.blocks("validation", chunk_size=width, block_size=context)
        result["cross_entropy"] = score_perplexity(model, blocks, num_blocks).cross_entropy
    for temperature, blocks_scored in ((1.0, num_blocks), (LOW, WARM_BLOCKS)):
        scorer = scorer_of(model, temperature=temperature)
        blocks = data.blocks("validation", chunk_size=scorer.chunk_size, block_size=context)
        num_draws = NUM_DRAWS if temperature == 1 else 2  # Unused with probabilities.
        brier = score_with(scorer, model, blocks, blocks_scored, SEED, num_draws)
        if temperature == 1:
            assert brier.documents is not None
            result["documents"] = rows_of(brier.documents)
        cost = cost_of(model.config, Work(context // size, scorer.reader.mean_draws))
        result[f"T{temperature:g}"] = {
            **brier_scores(brier),
            "hits": [100 * value for value in brier.hits[:4]],
            "collisions": [100 * value for value in brier.collisions[:4]],
            "draws": scorer.reader.mean_draws,
            "inference_flops": sum(cost.inference.values()),
        }
    return result


def score_floor(path: Path, context: int, num_blocks: int | None) -> Result:
    """BrierLM of a trigram model of the training text, and the share of well-formed held-out chunks."""
    data = load_prepared(path)
    blocks = data.blocks("validation", chunk_size=4, block_size=context)
    [(_, trigrams)] = ngram_models([3], data, 4)
    floor = score_ngrams_brier(trigrams, blocks, num_blocks)
    prompts, continuations = zip(*prompts_of(data), strict=True)
    words = share_of_words(data.tokenizer, prompts, continuations, known_words(data))
    scores = {"brier_lm": floor.brier_lm, "error": floor.brier_lm_error, "words": words}
    assert floor.documents is not None
    return scores | {"documents": rows_of(floor.documents)}


def score_words(folder: Path) -> dict[str, float]:
    """Share of well-formed chunks at two temperatures: four tokens generated after held-out text."""
    model, tokenizer = load_language_model_and_tokenizer(str(folder / "model"))
    data = load_prepared(folder.parent / "data")
    known, prompts = known_words(data), [prompt for prompt, _ in prompts_of(data)]
    shares = {}
    for temperature in (1.0, LOW):
        chunks: list[list[int]] = []
        for first in range(0, len(prompts), 64):
            batch = prompts[first : first + 64]
            chunks += continue_tokens(
                model, tokenizer, batch, max_new_tokens=4, temperature=temperature, seed=SEED
            ).tolist()
        shares[f"T{temperature:g}"] = share_of_words(tokenizer, prompts, chunks, known)
    return shares


def prompts_of(data: PreparedData) -> list[tuple[list[int], list[int]]]:
    """Prompts from the held-out text, each with the four tokens that follow it."""
    pairs = [
        (list(tokens[start : start + PROMPT]), list(tokens[start + PROMPT : start + PROMPT + 4]))
        for tokens in data.validation["input_ids"]
        for start in range(0, len(tokens) - PROMPT - 4, PROMPT)
    ]
    return pairs[:NUM_PROMPTS]


def share_of_words(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    chunks: Sequence[list[int]],
    known: tuple[set[str], set[str]],
) -> float:
    """Share of chunks, among those with letters, in which all words are known.

    A word is known if it occurs in the training text, and an unfinished one if a known word begins with it.
    """
    words, beginnings = known
    num_known = total = 0
    for prompt, chunk in zip(prompts, chunks, strict=True):
        context, text = (str(tokenizer.decode(ids)) for ids in (prompt[-8:], prompt[-8:] + chunk))
        # Words that the chunk begins, continues or ends; the first one of the context may be cut off.
        matches = [m for m in re.finditer(r"[A-Za-z]+", text) if m.end() > len(context) and m.start()]
        num_known += bool(matches) and all(
            m.group() in (beginnings if m.end() == len(text) else words) for m in matches
        )
        total += bool(matches)  # Chunks of punctuation do not count.
    return num_known / total


def known_words(data: PreparedData) -> tuple[set[str], set[str]]:
    """Words of the training text, and all their beginnings."""
    words: set[str] = set()
    for tokens in data.train["input_ids"]:
        words.update(re.findall(r"[A-Za-z]+", str(data.tokenizer.decode(tokens))))
    return words, {word[:end] for word in words for end in range(1, len(word) + 1)}


def report(folder: Path) -> None:
    """Print the table and draw the figure of all finished runs."""
    floor = json.loads((folder / FLOOR).read_text())
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*_seed*.json"))]
    print(
        f"trigram: {with_error(floor['brier_lm'], floor['error'])}; true chunks: {floor['words']:.1%} words"
    )
    print(
        "| model | FLOPs | seed | steps | nats | BrierLM | to the baseline | Brier-1..4 | min | T = 1 "
        "| T = 0.5 | draws | words |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for r in sorted(results, key=lambda r: (list(MODELS).index(r["model"]), r["budget"], r["seed"])):
        hot, cold = r["T1"], r["T0.5"]
        formed = ", ".join(f"{100 * share:.0f}%" for share in r["words"].values())
        print(
            f"| {MODELS[r['model']].label} | {r['training_flops']:.2e} | {r['seed']} | {r['steps']} "
            f"| {format(r['cross_entropy'], '.3f') if 'cross_entropy' in r else ''} "
            f"| {with_error(hot['brier_lm'], hot['error'])} | {difference_of(r, results)} "
            f"| {', '.join(f'{value:.2f}' for value in hot['brier'])} | {r['seconds'] / 60:.1f} "
            f"| {hot['inference_flops'] / 1e6:.2f} M | {cold['inference_flops'] / 1e6:.2f} M "
            f"| {cold['draws']:.0f} | {formed} |"
        )
    plot(results, floor, folder / "prose.png")


def difference_of(result: Result, results: list[Result]) -> str:
    """BrierLM minus that of the baseline with the same budget and seed; documents are paired."""
    for other in results:
        is_match = other["budget"] == result["budget"] and other["seed"] == result["seed"]
        if is_match and other["model"] == "baseline" != result["model"]:
            sums, baseline = sums_of(result["documents"]), sums_of(other["documents"])
            if not sums.pairs_with(baseline):
                return ""
            return with_error(*brier_lm_difference(sums, baseline), "+")
    return ""


def plot(results: list[Result], floor: Result, path: Path) -> None:
    """Plot BrierLM against training FLOPs, training time and FLOPs per generated token; and nats."""
    figure = new_figure(12, 8)
    axes = figure.subplots(2, 2).flatten()
    panels = (
        ("training FLOPs", lambda r: r["training_flops"], brier_of),
        ("training FLOPs", lambda r: r["training_flops"], nats_of),
        ("training minutes", lambda r: r["seconds"] / 60, brier_of),
        (f"FLOPs per written token, T = {LOW:g}", lambda r: r["T0.5"]["inference_flops"], brier_of),
    )
    order = {name: index for index, name in enumerate(MODELS)}
    ordered = sorted(results, key=lambda r: (order[r["model"]], r["budget"]))
    for name, group in groupby(ordered, lambda r: r["model"]):
        runs = list(group)
        for axis, (label, x_of, y_of) in zip(axes, panels, strict=True):
            points = []
            for _, seeds in groupby(runs, lambda r: r["budget"]):
                same = list(seeds)
                values, errors = zip(*map(y_of, same), strict=True)
                spread = float(torch.tensor(values).std()) if len(values) > 1 else 0.0
                # Seeds share the documents, so the error over documents does not shrink with their number.
                known = [error for error in errors if not math.isnan(error)] or [
                    0.0
                ]  # NaN if the score is 0.
                error = max(statistics.mean(known), spread / len(values) ** 0.5)
                points.append((statistics.mean(map(x_of, same)), statistics.mean(values), error))
            x, y, error = zip(*points, strict=True)
            axis.errorbar(
                x, y, yerr=error, marker="o", capsize=3, color=f"C{order[name]}", label=MODELS[name].label
            )
            axis.set(xlabel=label, xscale="log")
            axis.xaxis.set_minor_formatter(NullFormatter())  # Labels between the powers of ten would collide.
    budgets = sorted({result["budget"] for result in results})
    for axis in axes[:2]:
        axis.set_xticks(budgets, [f"{budget:.2g}" for budget in budgets])
    axes[2].set_xticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    for axis, (_, _, y_of) in zip(axes, panels, strict=True):
        axis.set_ylabel("nats per token (held-out)" if y_of is nats_of else "BrierLM (held-out, T = 1)")
        if y_of is brier_of:
            axis.axhline(floor["brier_lm"], color="gray", linestyle="--", label="trigram")
        axis.grid(alpha=0.3)
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize="small")
    figure.savefig(path, dpi=110)
    print(path)


def brier_of(result: Result) -> tuple[float, float]:
    """BrierLM at T = 1, and its standard error."""
    return result["T1"]["brier_lm"], result["T1"]["error"]


def nats_of(result: Result) -> tuple[float, float]:
    """Cross-entropy, NaN if the model has none, and an error of 0."""
    return result.get("cross_entropy", math.nan), 0.0


if __name__ == "__main__":
    main()
