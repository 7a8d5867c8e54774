"""Train a small CALM on text of your own, score it on held-out text, and let it write.

    python examples/train_on_your_text.py my_texts/ --output runs/mine

The same from the command line: `calm train --recipe cpu_tiny --data.sources my_texts/ --output runs/mine`,
then `calm evaluate` and `calm generate`.
"""

import argparse
from pathlib import Path

from calm import (
    block_settings,
    continue_texts,
    load_model_and_tokenizer,
    load_prepared,
    read_recipe,
    score_model,
    train,
    with_settings,
)
from calm.report.tables import print_scorecard


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a plain-text, .jsonl or .parquet file, or a folder of them")
    parser.add_argument("--output", type=Path, default=Path("runs/mine"))
    parser.add_argument("--recipe", default="cpu_tiny")
    parser.add_argument("--steps", type=int, help="of the language model; by default those of the recipe")
    arguments = parser.parse_args()

    recipe = with_settings(read_recipe(arguments.recipe), {"data.sources": arguments.text})
    if arguments.steps:
        recipe = with_settings(recipe, {"language_model.training.steps": arguments.steps})
    folder = train(recipe, arguments.output, resume=(arguments.output / "recipe.yaml").is_file())

    model, tokenizer = load_model_and_tokenizer(folder)
    data = load_prepared(arguments.output / "data")
    print_scorecard(score_model(model, data, block_settings(recipe), ngrams=[3]))
    for beginning, _ in data.held_out_beginnings(2):
        [text] = continue_texts(model, tokenizer, [beginning], max_new_tokens=60, temperature=0.5, seed=1)
        print(f"{beginning} |{text}\n")


if __name__ == "__main__":
    main()
