"""What benchmarks share that train small models of prose, one for each kind, budget and seed."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from calm.data.prepare import prepare
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE
from calm.training.stages import train

Row = dict[str, Any]
Run = Callable[[str, float, int, Path, Path], None]


def fill_table(
    about: str,
    kinds: Iterable[str],
    budget: float,
    results: str,
    run: Run,
    table: Callable[[list[Row]], list[str]],
) -> None:
    """The command of such a benchmark: train and score what is missing, and print a table.

    Args:
        about: What its help says.
        kinds: What there is to train.
        budget: FLOPs of each, where no others are asked for.
        results: Folder beside this file that results are in.
        run: Trains and scores one, unless it was, given kind, budget, seed, text and folder of results.
        table: The lines of the table, from all results.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="train.jsonl.xz", help="training text")
    parser.add_argument("--valid", default="valid.jsonl.xz", help="held-out text")
    parser.add_argument("--output", type=Path, help="folder of text and runs; without, nothing is trained")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / results)
    parser.add_argument("--kinds", nargs="*", default=list(kinds), choices=list(kinds))
    parser.add_argument("--budgets", nargs="+", type=float, default=[budget])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    arguments = parser.parse_args()
    if arguments.output:
        data = arguments.output.resolve() / "data"
        if not data.is_dir():
            prepare([arguments.train], data, validation_sources=[arguments.valid], vocab_size=4096)
        for seed in arguments.seeds:
            for one in arguments.budgets:
                for kind in arguments.kinds:
                    run(kind, one, seed, data, arguments.results)
    rows = [json.loads(file.read_text()) for file in sorted(arguments.results.glob("*.json"))]
    print("\n".join(table(rows)))


def trained(recipe: Recipe, folder: Path) -> int:
    """Train a model, or go on where that was stopped; the steps that it takes."""
    steps = recipe.language_model.training.steps
    print(f"{folder.name}: {steps} steps", flush=True)
    train(recipe, folder, resume=(folder / RECIPE).is_file())
    return steps
