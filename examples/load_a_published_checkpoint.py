"""Load a released checkpoint, say what it costs, and let it write at several temperatures.

    python examples/load_a_published_checkpoint.py CALM-Autoencoder CALM-M "The capital of France"

Both folders are as released (config.json and weights); the tokenizer is taken from the second.
"""

import argparse
from pathlib import Path

from calm import continue_texts, load_tokenizer
from calm.flops import Work, cost_of
from calm.models.published import load_published


def main() -> None:
    """Load, count, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()

    model = load_published(arguments.autoencoder, arguments.model)
    tokenizer = load_tokenizer(str(arguments.model))
    parameters = sum(cost_of(model.config).parameters.values())
    print(f"{parameters:,.0f} parameters, K = {model.config.chunk_size}, head {model.config.head.head_type}")
    for temperature, draws in ((1.0, 1), (0.5, 200)):
        work = Work(positions=512, draws=draws)
        flops = sum(cost_of(model.config, work).inference.values())
        [text] = continue_texts(
            model,
            tokenizer,
            [arguments.prompt],
            max_new_tokens=arguments.tokens,
            temperature=temperature,
            seed=1,
        )
        print(f"T = {temperature:g}, {flops:.3g} FLOPs a token with {draws} draws a chunk:")
        print(f"{arguments.prompt}{text}\n")


if __name__ == "__main__":
    main()
