"""Uptrain a Transformer to a CALM, train a CALM from scratch, or train the Transformer further?

    calm prepare train.jsonl.xz --validation valid.jsonl.xz --tokenizer SOURCE --output runs/data
    python benchmarks/uptraining.py --source SOURCE --data runs/data --output runs/uptraining \
        --results benchmarks/results/uptraining

All models train on the same text in the same order, for the same FLOPs (a teacher's included). They are
scored on held-out text during training and at its end, after the learning rate has decayed. `new_same` has
the sizes of the uptrained CALM, `new_small` sizes that suit so little training. The small model
spends nearly all of its time on the vocabulary, so it takes as many minutes for a tenth of the FLOPs; that is
all it gets.

Finished runs and results are kept, so an interrupted benchmark resumes. Without `--output`, the table and the
figure are made from existing results.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from measure import brier_scores, json_rows, machine
from transformers import LlamaConfig, LlamaForCausalLM

from calm.comparison.costs import affordable_steps, record_of
from calm.data.prepared import load_prepared
from calm.data.tokenizer import load_tokenizer
from calm.evaluation.held_out import score_perplexity, score_with
from calm.evaluation.scorers import scorer_of
from calm.flops import Work, cost_of
from calm.models.language_model import language_model
from calm.models.loading import load_language_model_and_tokenizer
from calm.report.panels import new_figure
from calm.report.tables import with_error
from calm.storage.disk import write_atomically
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, read_recipe, with_settings
from calm.training.stages import train

CONTEXT, EVALUATIONS = 512, 4
GOAL = 0.1
"""Nats from the source at which a conversion has succeeded."""
DECAY_FRACTION = 0.3
NUM_SCORED = 60
"""Blocks of held-out text for the final scores."""
OPTIMIZER = "language_model.training.optimizer."
SHARED = {
    "data.context": CONTEXT,
    "language_model.training.batch_tokens": 4096,
    "language_model.training.precision": "bf16",
    "language_model.training.save_every": 20,
    "language_model.training.log_every": 10,
    "language_model.training.evaluation_blocks": 10,
    OPTIMIZER + "warmup_steps": 10,
    OPTIMIZER + "schedule": "warmup_stable_decay",
    OPTIMIZER + "decay_fraction": DECAY_FRACTION,
}
SMALL = {
    "language_model.hidden_size": 128,
    "language_model.intermediate_size": 352,
    "language_model.head.num_classes": 1,
    "language_model.head.rank": 48,
    "language_model.head.token_size": 48,
}
ADAMW = {OPTIMIZER + "name": "adamw", OPTIMIZER + "learning_rate": 6e-4}
"""By the training loss of the first 16 steps, 3e-4 and 1e-3 are about as good, and Muon (2e-3) is worse."""


def uptraining_settings(chunk_size: int, first: int, last: int, **extra: Any) -> dict[str, Any]:
    """Settings of a CALM that is made of a Transformer."""
    return ADAMW | {
        "chunk_size": chunk_size,
        "language_model.uptraining.first_layers": first,
        "language_model.uptraining.last_layers": last,
        **extra,
    }


class Way(NamedTuple):
    """A way of obtaining a model.

    Args:
        label: Label of its row in the table. In brackets: first and last layers in the head.
        settings: Settings in addition to the shared ones.
        begins_with: The Transformer to start from: the source, an untrained one of its sizes, or none.
        recipe: The recipe that the settings change.
        share: Share of the budget that it gets.
    """

    label: str
    settings: dict[str, Any]
    begins_with: Literal["source", "untrained"] | None = "source"
    recipe: str = "laptop_quick"
    share: float = 1.0


WAYS = {
    "source": Way(
        "the Transformer trained further",
        ADAMW | {"model": "autoregressive", "chunk_size": 1, OPTIMIZER + "learning_rate": 1e-4},
    ),
    "uptrained_K2": Way("uptrained, K = 2 (1, 4)", uptraining_settings(2, 1, 4)),
    "uptrained_K4": Way("uptrained, K = 4 (4, 8)", uptraining_settings(4, 4, 8)),
    "uptrained_K4_short": Way("uptrained, K = 4 (1, 2)", uptraining_settings(4, 1, 2)),
    "uptrained_K4_long": Way(
        "uptrained, K = 4 (2, 4), eight times as long", uptraining_settings(4, 2, 4), share=8
    ),
    "taught_K4": Way(
        "uptrained, K = 4 (4, 8), taught",
        uptraining_settings(4, 4, 8, **{"language_model.teacher.weight": 0.5}),
    ),
    "new_same": Way("from scratch, the same sizes, K = 4 (4, 8)", uptraining_settings(4, 4, 8), "untrained"),
    "new_small": Way(
        "from scratch, small, K = 4", SMALL | {OPTIMIZER + "warmup_steps": 20}, None, "draft", share=0.1
    ),
}
Row = dict[str, Any]


def main() -> None:
    """Train and score whatever is missing, then print the table and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="folder of a Transformer")
    parser.add_argument("--data", type=Path, help="prepared text, with the Transformer's tokenizer")
    parser.add_argument("--output", type=Path, help="folder of runs; without, nothing is trained")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/uptraining")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--budget", type=float, default=1.5e14, help="training FLOPs of each")
    parser.add_argument("--figure", type=Path, help="where the figure is drawn, a PNG")
    arguments = parser.parse_args()
    for way in arguments.ways if arguments.output else ():
        run(way, arguments)
    rows = [json.loads(file.read_text()) for file in sorted(arguments.results.glob("*.json"))]
    rows.sort(key=lambda row: list(WAYS).index(row["way"]))
    print(table(rows))
    print("\n".join(forecasts(rows)))
    if arguments.figure:
        draw(rows, arguments.figure)


def run(way: str, arguments: argparse.Namespace) -> None:
    """Train a model, and save its learning curve and its scores."""
    file = arguments.results / f"{way}.json"
    if file.exists():
        return
    output = arguments.output.resolve()
    recipe = recipe_of(way, arguments.source.resolve(), arguments.data.resolve(), arguments.budget, output)
    folder, training = output / way, recipe.language_model.training
    print(f"{way}: {training.steps:,} steps", flush=True)
    train(recipe, folder, resume=(folder / RECIPE).is_file())
    model, _ = load_language_model_and_tokenizer(str(folder / "model"), dtype=torch.bfloat16)
    record = record_of(folder, model.config)
    assert record is not None
    scorer = scorer_of(model)
    blocks = load_prepared(arguments.data).blocks(
        "validation", chunk_size=scorer.chunk_size, block_size=CONTEXT
    )
    brier = score_with(scorer, model, blocks, NUM_SCORED, 1, 8)
    cost = cost_of(model.config, Work(CONTEXT // language_model(model).chunk_size))
    row = {
        "way": way,
        "training_flops": record.flops,
        "seconds": record.seconds,
        "training_tokens": training.tokens,
        "parameters": sum(cost.parameters.values()),
        "inference_flops": sum(cost.inference.values()),
        "curve": [[checkpoint.flops, checkpoint.cross_entropy] for checkpoint in record.checkpoints],
        "nats": score_perplexity(model, blocks, NUM_SCORED).cross_entropy,
        **brier_scores(brier),
        "machine": machine(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json_rows(row) + "\n")


def recipe_of(way: str, source: Path, data: Path, budget: float, output: Path) -> Recipe:
    """The recipe of a way, with as many steps as its budget allows."""
    _, changes, begins_with, base, share = WAYS[way]
    settings = SHARED | {"seed": 1, "data.sources": str(data)} | changes
    if begins_with is not None:
        start = source if begins_with == "source" else untrained(source, output / "untrained")
        settings |= {"language_model.init_from": str(start)}
    if "language_model.teacher.weight" in settings:
        settings |= {"language_model.teacher.model": str(source)}
    recipe = with_settings(read_recipe(base), settings)
    steps = affordable_steps(recipe, load_prepared(data).vocab_size, share * budget)
    evaluations = EVALUATIONS * max(1, round(share))
    training = {"steps": steps, "evaluate_every": max(1, steps // evaluations)}
    return with_settings(
        recipe, {f"language_model.training.{name}": value for name, value in training.items()}
    )


def untrained(source: Path, folder: Path) -> Path:
    """An untrained Transformer with the source's sizes and tokenizer."""
    if not (folder / "config.json").exists():
        torch.manual_seed(1)
        load_tokenizer(str(source)).save_pretrained(folder)
        LlamaForCausalLM(LlamaConfig.from_pretrained(source)).save_pretrained(folder)
    return folder


def table(rows: list[Row]) -> str:
    """One line per way."""
    lines = [
        "| | parameters | FLOPs of a token | tokens read | nats | BrierLM | Brier-1 | min |",
        "|" + "---|" * 8,
    ]
    lines += [
        f"| {WAYS[row['way']].label} | {row['parameters'] / 1e6:.0f} M "
        f"| {row['inference_flops'] / 1e6:.0f} M | {row['training_tokens'] / 1e3:,.0f} k | {row['nats']:.2f} "
        f"| {with_error(row['brier_lm'], row['error'])} | {row['brier'][0]:.1f} | {row['seconds'] / 60:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def forecasts(rows: list[Row]) -> list[str]:
    """What the curves ask for: after how many tokens a model would be within 0.1 nats of the source.

    The distance to the source, trained further, is fitted as a power of the tokens read, from a tenth of the
    run to where its learning rate decays. Only runs with at least six scores there are fitted.
    """
    source = next((row for row in rows if row["way"] == "source"), None)
    if source is None:
        return []
    target, lines = min(nats for _, nats in source["curve"]), []
    for row in rows:
        per_token = row["training_flops"] / row["training_tokens"]
        scores = [
            (flops / per_token, nats - target)
            for flops, nats in row["curve"]
            if 0.1 <= flops / row["training_flops"] <= 1 - DECAY_FRACTION and nats > target
        ]
        if len(scores) < 6 or row is source:
            continue
        tokens, distances = np.log(np.array(scores)).T
        (slope, start), covariance = np.polyfit(tokens, distances, 1, cov=True)
        needed = np.exp((np.log(GOAL) - start) / slope)
        lines.append(
            f"{WAYS[row['way']].label}: the distance to the source falls as tokens^{slope:.3f} "
            f"(± {covariance[0, 0] ** 0.5:.3f}); within {GOAL} nats after {needed:.1e} tokens, "
            f"{needed * per_token:.1e} FLOPs"
        )
    return lines


def draw(rows: list[Row], figure: Path) -> None:
    """Plot held-out nats against training FLOPs, and against minutes."""
    drawing = new_figure(11, 4.5)
    panels = drawing.subplots(1, 2, sharey=True)
    for row in rows:
        flops, nats = zip(*row["curve"], strict=True)
        minutes = [row["seconds"] / 60 * spent / row["training_flops"] for spent in flops]
        for axes, x in zip(panels, (flops, minutes), strict=True):
            axes.plot(x, nats, marker="o", markersize=3, label=WAYS[row["way"]].label)
    for axes, label in zip(panels, ("training FLOPs", "minutes"), strict=True):
        axes.set(xlabel=label, xscale="log")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="held-out nats per token")
    panels[1].legend(fontsize="small", loc="upper right")
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure, dpi=120, facecolor="white")


if __name__ == "__main__":
    main()
