"""Does a second stage of training, by the Brier score, improve a head that draws all tokens at once?

    python benchmarks/second_stage.py --train train.jsonl.xz --valid valid.jsonl.xz --output runs/second_stage

The parallel head (K = 4, otherwise recipe `laptop_quick` at the size of prose.py) is trained by cross-entropy
for a share of a budget of FLOPs, and then by minus the mean of Brier-1 to Brier-4. It is compared with
cross-entropy for the whole budget; with cross-entropy in both stages, at the learning rates of the second;
and with the sequential head. The learning rate of the second stage was not tuned.

Finished runs and results are kept, so an interrupted benchmark resumes. Without `--output`, the table is
printed from existing results.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from measure import brier_scores, error_over_seeds, machine
from prose import CONTEXT, NUM_DRAWS, SEED, recipe_of, with_budget, write
from prose_runs import fill_table, trained

from calm.data.prepared import load_prepared
from calm.evaluation.held_out import score_perplexity, score_with
from calm.evaluation.scorers import scorer_of
from calm.models.loading import load_language_model_and_tokenizer
from calm.report.tables import with_error
from calm.training.recipe import Recipe


class Way(NamedTuple):
    """A way of spending a budget.

    Args:
        label: Label of its row in the table.
        head_type: The head.
        share: Share of the second stage in the budget.
        loss: Loss of the second stage.
    """

    label: str
    head_type: str = "parallel"
    share: float = 0.0
    loss: str = "cross_entropy"


WAYS = {
    "sequential": Way("sequential head", "sequential"),
    "cross_entropy": Way("parallel head, cross-entropy"),
    "continued": Way("the same, the last fifth at the rates of a second stage", share=0.2),
    "brier": Way("the last fifth by Brier scores", share=0.2, loss="brier"),
    "brier_half": Way("the second half by Brier scores", share=0.5, loss="brier"),
    "brier_alone": Way("all by Brier scores", share=1.0, loss="brier"),
}
RATE = 3e-3
"""Peak learning rate of matrices in the second stage; other weights have a third of it."""


def run(name: str, budget: float, seed: int, data: Path, results: Path) -> None:
    """Train and score one model, unless its result exists."""
    file = results / f"{name}_{budget:.3g}_seed{seed}.json"
    if file.is_file():
        return
    way, folder = WAYS[name], data.parent / file.stem
    recipe, steps = recipe_for(way.head_type, seed, data), []
    first = data.parent / f"{way.head_type}_{budget * (1 - way.share):.3g}_seed{seed}"
    if way.share < 1:
        steps.append(trained(with_budget(recipe, budget * (1 - way.share)), first))
    if way.share > 0:
        init_from = str(first / "model") if way.share < 1 else None
        second = second_stage(recipe, init_from, way.loss)
        steps.append(trained(with_budget(second, budget * way.share), folder))
    else:
        folder = first
    model, _ = load_language_model_and_tokenizer(str(folder / "model"))
    blocks = load_prepared(data).blocks("validation", chunk_size=4, block_size=CONTEXT)
    brier = score_with(scorer_of(model), model, blocks, None, SEED, NUM_DRAWS)
    result = {
        "way": name,
        "budget": budget,
        "seed": seed,
        "steps": steps,
        "cross_entropy": score_perplexity(model, blocks).cross_entropy,
        **brier_scores(brier),
        "machine": machine(),
    }
    results.mkdir(parents=True, exist_ok=True)
    write(file, result)


def recipe_for(head_type: str, seed: int, data: Path) -> Recipe:
    """The recipe of the first stage, for any budget."""
    recipe = recipe_of("sequential_K4", seed, data)
    head = recipe.language_model.head
    if head_type != "sequential":
        head = {"head_type": head_type, "rank": head["rank"]}
    return dataclasses.replace(recipe, language_model=dataclasses.replace(recipe.language_model, head=head))


def second_stage(recipe: Recipe, init_from: str | None, loss: str) -> Recipe:
    """The recipe of the second stage; without a model to start from, it has the rates of a first stage."""
    model = recipe.language_model
    training = model.training
    if init_from is not None:
        optimizer = dataclasses.replace(
            training.optimizer,
            learning_rate=RATE,
            adamw_learning_rate=RATE / 3,
            warmup_steps=10,
            schedule="linear",
        )
        training = dataclasses.replace(training, optimizer=optimizer)
    model = dataclasses.replace(
        model, init_from=init_from, training=training, head=model.head | {"loss": loss}
    )
    return dataclasses.replace(recipe, language_model=model)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line per way and budget, with means over seeds."""
    lines = ["| | FLOPs | seeds | nats a token | BrierLM | Brier-1 | Brier-2 | Brier-3 | Brier-4 |"]
    lines.append("|" + "---|" * 9)
    for budget in sorted({row["budget"] for row in rows}):
        for name, way in WAYS.items():
            same = [row for row in rows if (row["way"], row["budget"]) == (name, budget)]
            if not same:
                continue
            scores, nats = ([row[key] for row in same] for key in ("brier_lm", "cross_entropy"))
            error = error_over_seeds(scores, [row["error"] for row in same])
            orders = " | ".join(
                f"{statistics.mean(row['brier'][n] for row in same):.{(1, 2, 2, 3)[n]}f}" for n in range(4)
            )
            lines.append(
                f"| {way.label} | {budget:.1e} | {len(same)} | {statistics.mean(nats):.2f} "
                f"| {with_error(statistics.mean(scores), error)} | {orders} |"
            )
    return lines


if __name__ == "__main__":
    fill_table(__doc__ or "", WAYS, 2.5e12, "second_stage", run, table)
