"""Float32 products of oneDNN against MKL's, which stop at AVX2 on AMD processors: whole training steps.

    python benchmarks/float32.py

Forward, backward, clipping and optimizer of shipped recipes, with their batches and contexts, on random
tokens, a few of which are padding, more or fewer in each step. In turns in one process, for each number of
threads. Where `calm.hardware.fast_float32` changes nothing, as at a width of 64, the ratios are 1.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable

import torch
from measure import in_turns, machine, ratios
from torch import Tensor
from training_step import take_step

from calm.core.chunks import IGNORED_LABEL
from calm.hardware import fast_float32
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmConfig
from calm.models.tokens import LlamaForCausalLM
from calm.training.build import model_config
from calm.training.optimizers import build_optimizer
from calm.training.recipe import Recipe
from calm.training.recipe_files import read_recipe

CPU = torch.device("cpu")
RECIPES = ("laptop", "laptop, a Transformer", "demo", "demo_baseline", "draft", "laptop_quick")


def recipe_of(name: str) -> Recipe:
    """A shipped recipe, or the Transformer of its sizes."""
    shipped, _, is_transformer = name.partition(", ")
    recipe = read_recipe(shipped)
    if is_transformer:
        recipe = dataclasses.replace(recipe, model="autoregressive", chunk_size=1)
    return recipe


def step(recipe: Recipe, is_fast: bool) -> Callable[[], Tensor]:
    """A function that takes a training step and returns its loss."""
    torch.manual_seed(0)
    config, context, training = model_config(recipe), recipe.data.context, recipe.language_model.training
    model_class: type = CalmForCausalLM if isinstance(config, CalmConfig) else LlamaForCausalLM
    model = model_class(config).train()
    optimizer = build_optimizer(model, training.optimizer)
    blocks = training.batch_tokens // context
    ids = torch.randint(4, config.get_text_config().vocab_size, (blocks, context))
    positions = torch.arange(context // recipe.chunk_size).expand(blocks, -1)

    def run() -> Tensor:
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.02, IGNORED_LABEL)
        with fast_float32(CPU, recipe.language_model.hidden_size) if is_fast else contextlib.nullcontext():
            return take_step(
                model, optimizer, lambda: model(input_ids=ids, labels=labels, position_ids=positions).loss
            )

    return run


def main() -> None:
    """Print a line for each model and number of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(machine())
    print("| recipe | threads | MKL: ms | oneDNN: ms | times as fast |")
    print("|---|---|---|---|---|")
    for name in arguments.recipes:
        recipe = recipe_of(name)
        steps = {is_fast: step(recipe, is_fast) for is_fast in (False, True)}
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            table = ratios(in_turns(steps, arguments.rounds, warm_up=2), False)
            seconds, ratio, least, most = table[True]
            print(
                f"| {name} | {threads} | {1000 * table[False][0]:.0f} | {1000 * seconds:.0f} "
                f"| {ratio:.2f} ({least:.2f} to {most:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
