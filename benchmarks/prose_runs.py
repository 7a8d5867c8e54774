"""Shared by benchmarks that train small models of prose, one for each kind, budget and seed."""

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
    """Run the command line of such a benchmark: train and score whatever is missing, and print a table.

    Args:
        about: Text of its help.
        kinds: All kinds of models.
        budget: Default budget in FLOPs.
        results: Subfolder of `results` for its results.
        run: Trains and scores a model, unless its result exists; called with kind, budget, seed, the prepared
            text and the folder of results.
        table: Results -> the lines of the table.
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
            for flops in arguments.budgets:
                for kind in arguments.kinds:
                    run(kind, flops, seed, data, arguments.results)
    rows = [json.loads(file.read_text()) for file in sorted(arguments.results.glob("*.json"))]
    print("\n".join(table(rows)))


def trained(recipe: Recipe, folder: Path) -> int:
    """Train a model, or resume its training; return the number of its steps."""
    steps = recipe.language_model.training.steps
    print(f"{folder.name}: {steps} steps", flush=True)
    train(recipe, folder, resume=(folder / RECIPE).is_file())
    return steps
