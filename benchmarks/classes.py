"""Is a two-step softmax worth it? Nats, BrierLM and minutes at equal training FLOPs, on prose.

    python benchmarks/classes.py --train train.jsonl.xz --valid valid.jsonl.xz --output runs/classes

It compares a Transformer; the sequential head with K = 4 (recipe `laptop_quick`), with one softmax over 4,096
tokens and with classes of tokens; the same head with classes and chunks of a single token, which is a
Transformer with classes; and the coarse-to-fine head. All are trained for the same FLOPs (`calm flops`) on
the same text.

Finished runs and results are kept, so an interrupted benchmark resumes. Without `--output`, the table is
printed from existing results.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from measure import error_over_seeds, machine
from prose import CONTEXT, recipe_of, score, with_budget, write
from prose_runs import fill_table, trained

from calm.comparison.ladder import at_chunk_size
from calm.report.tables import with_error
from calm.training.recipe import Recipe

KINDS = {
    "transformer": "Transformer",
    "one_softmax": "K = 4, one softmax",
    "classes_32": "K = 4, 32 classes",
    "classes_64": "K = 4, 64 classes",
    "classes_128": "K = 4, 128 classes",
    "tokens_64": "K = 1, 64 classes",
    "coarse_to_fine": "K = 4, coarse to fine",
}


def run(kind: str, budget: float, seed: int, data: Path, results: Path) -> None:
    """Train and score one model, unless its result exists."""
    name = f"{kind}_{budget:.3g}_seed{seed}"
    if (results / f"{name}.json").is_file():
        return
    recipe = with_budget(recipe_for(kind, seed, data), budget)
    folder = data.parent / name
    tokens = trained(recipe, folder) * recipe.language_model.training.batch_tokens
    scores = score(folder, CONTEXT, None)
    del scores["documents"]
    results.mkdir(parents=True, exist_ok=True)
    result = {"kind": kind, "budget": budget, "seed": seed, "tokens": tokens, **scores, "machine": machine()}
    write(results / f"{name}.json", result)


def recipe_for(kind: str, seed: int, data: Path) -> Recipe:
    """The recipe of a model, for any budget."""
    if kind == "transformer":
        return recipe_of("baseline", seed, data)
    recipe, (prefix, _, num_classes) = recipe_of("sequential_K4", seed, data), kind.partition("_")
    if prefix == "tokens":
        recipe = at_chunk_size(recipe, 1)
    head = recipe.language_model.head
    if kind == "coarse_to_fine":
        head = {"head_type": kind, "rank": head["rank"]}
    elif prefix != "one":
        head = head | {"num_classes": int(num_classes)}
    return dataclasses.replace(recipe, language_model=dataclasses.replace(recipe.language_model, head=head))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line per kind and budget, with means over seeds."""
    lines = [
        "| model | FLOPs | tokens read | nats a token | BrierLM | Brier-1 | minutes | FLOPs to write one |",
        "|" + "---|" * 8,
    ]
    for budget in sorted({row["budget"] for row in rows}):
        for kind, label in KINDS.items():
            same = [row for row in rows if (row["kind"], row["budget"]) == (kind, budget)]
            if not same:
                continue
            nats = [row["cross_entropy"] for row in same if "cross_entropy" in row]
            brier = [row["T1"]["brier_lm"] for row in same]
            error = error_over_seeds(brier, [row["T1"]["error"] for row in same])
            brier_1 = statistics.mean(row["T1"]["brier"][0] for row in same)
            minutes = statistics.mean(row["seconds"] for row in same) / 60
            lines.append(
                f"| {label} | {budget:.0e} | {same[0]['tokens'] / 1e6:.1f} M "
                f"| {' / '.join(f'{value:.3f}' for value in nats)} "
                f"| {with_error(statistics.mean(brier), error)} | {brier_1:.1f} | {minutes:.1f} "
                f"| {same[0]['T1']['inference_flops'] / 1e6:.2f} M |"
            )
    return lines


if __name__ == "__main__":
    fill_table(__doc__ or "", KINDS, 5e12, "classes", run, table)
