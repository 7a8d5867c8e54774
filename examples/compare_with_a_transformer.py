"""A CALM and a Transformer of equal training FLOPs, on the same text and the same held-out part.

    python examples/compare_with_a_transformer.py my_texts/ --output runs/compare

The same from the command line: `calm compare --recipe MINE.yaml --chunk_sizes '[4]'`. It ends with a table
and report.html, with what each of the two writes.
"""

import argparse
from pathlib import Path

from calm import read_recipe, with_settings
from calm.comparison.ladder import train_ladder
from calm.comparison.measures import Measures, compare
from calm.report.comparison import print_comparison, write_comparison


def main() -> None:
    """Train both, score both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a plain-text, .jsonl or .parquet file, or a folder of them")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--recipe", default="cpu_tiny")
    parser.add_argument("--budget", type=float, default=1.0, help="share of the recipe's FLOPs for each")
    arguments = parser.parse_args()

    recipe = with_settings(read_recipe(arguments.recipe), {"data.sources": arguments.text})
    runs = train_ladder(recipe, [recipe.chunk_size], arguments.output, baseline=True, budget=arguments.budget)
    comparison = compare(runs, None, Measures(context=recipe.data.context))
    print_comparison(comparison)
    write_comparison(comparison, arguments.output / "report.html")
    print(f"report: {arguments.output / 'report.html'}")


if __name__ == "__main__":
    main()
