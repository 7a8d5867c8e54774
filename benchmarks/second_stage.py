"""Does training by the Brier score after cross-entropy make a head better that draws all tokens at once?

    python benchmarks/second_stage.py --train train.jsonl.xz --valid valid.jsonl.xz --output runs/second_stage

The parallel head (K = 4, the rest as in recipe `laptop_quick` at the size of prose.py) is trained by
cross-entropy for a share of a budget of FLOPs, and for the rest by minus the mean of Brier-1 to Brier-4.
Beside it: cross-entropy for all of the budget; cross-entropy in both stages, at the rates of the second; and
the sequential head. The rate of the second stage is the first that was tried.

What is finished is kept, so the benchmark goes on where it was stopped. Without `--output` the table is drawn
from the results alone.
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
        label: In the table.
        head_type: The head.
        share: Of the second stage.
        loss: Of the second stage.
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
"""Peak rate of matrices in the second stage; of all else a third of it."""


def run(name: str, budget: float, seed: int, data: Path, results: Path) -> None:
    """Train and score one model, unless it was."""
    file = results / f"{name}_{budget:.3g}_seed{seed}.json"
    if file.is_file():
        return
    way, folder = WAYS[name], data.parent / file.stem
    recipe, steps = recipe_for(way.head_type, seed, data), []
    first = data.parent / f"{way.head_type}_{budget * (1 - way.share):.3g}_seed{seed}"
    if way.share < 1:
        steps.append(trained(with_budget(recipe, budget * (1 - way.share)), first))
    if way.share > 0:
        begin = str(first / "model") if way.share < 1 else None
        steps.append(trained(with_budget(second(recipe, begin, way.loss), budget * way.share), folder))
    else:
        folder = first
    model, _ = load_language_model_and_tokenizer(str(folder / "model"))
    blocks = load_prepared(data).blocks("validation", chunk_size=4, block_size=CONTEXT)
    brier = score_with(scorer_of(model), model, blocks, None, SEED, NUM_DRAWS)
    found = {
        "way": name,
        "budget": budget,
        "seed": seed,
        "steps": steps,
        "cross_entropy": score_perplexity(model, blocks).cross_entropy,
        **brier_scores(brier),
        "machine": machine(),
    }
    results.mkdir(parents=True, exist_ok=True)
    write(file, found)


def recipe_for(head_type: str, seed: int, data: Path) -> Recipe:
    """The recipe of the first stage, whatever the budget."""
    recipe = recipe_of("sequential_K4", seed, data)
    head = recipe.language_model.head
    if head_type != "sequential":
        head = {"head_type": head_type, "rank": head["rank"]}
    return dataclasses.replace(recipe, language_model=dataclasses.replace(recipe.language_model, head=head))


def second(recipe: Recipe, begin: str | None, loss: str) -> Recipe:
    """The recipe of the second stage; at the rates of a first if it begins with no model."""
    model = recipe.language_model
    training = model.training
    if begin is not None:
        rates = dataclasses.replace(
            training.optimizer,
            learning_rate=RATE,
            adamw_learning_rate=RATE / 3,
            warmup_steps=10,
            schedule="linear",
        )
        training = dataclasses.replace(training, optimizer=rates)
    model = dataclasses.replace(model, init_from=begin, training=training, head=model.head | {"loss": loss})
    return dataclasses.replace(recipe, language_model=model)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each way and budget, means over seeds."""
    lines = ["| | FLOPs | seeds | nats a token | BrierLM | Brier-1 | Brier-2 | Brier-3 | Brier-4 |"]
    lines.append("|" + "---|" * 9)
    for budget in sorted({row["budget"] for row in rows}):
        for name, way in WAYS.items():
            same = [row for row in rows if (row["way"], row["budget"]) == (name, budget)]
            if not same:
                continue
            score, nats = ([row[key] for row in same] for key in ("brier_lm", "cross_entropy"))
            error = error_over_seeds(score, [row["error"] for row in same])
            orders = " | ".join(
                f"{statistics.mean(row['brier'][n] for row in same):.{(1, 2, 2, 3)[n]}f}" for n in range(4)
            )
            lines.append(
                f"| {way.label} | {budget:.1e} | {len(same)} | {statistics.mean(nats):.2f} "
                f"| {with_error(statistics.mean(score), error)} | {orders} |"
            )
    return lines


if __name__ == "__main__":
    fill_table(__doc__ or "", WAYS, 2.5e12, "second_stage", run, table)
