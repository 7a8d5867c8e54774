"""What does a head with a temperature of its own lose, compared with exact sampling of whole chunks?

    python benchmarks/head_temperature.py runs/demo_categorical

At held-out positions of a run, chunks are drawn with each sampler. The table says how often a chunk occurs
anywhere in the training text (is it well-formed?), how often it equals the next chunk of the text or begins
with the next token, how often two samples agree, and what a generated token costs.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from calm.core.chunks import find_targets, split_into_chunks
from calm.core.samplers import ExactSampler, HeadSampler, Sampler
from calm.data.prepared import PreparedData, load_prepared
from calm.evaluation.held_out import batches_of
from calm.flops import Work, cost_of
from calm.models.calm import CalmForCausalLM
from calm.models.loading import load_model
from calm.models.readers import ChunkReader
from calm.training.opening import data_folder
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, read_recipe


def main() -> None:
    """Draw with every sampler, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--blocks", type=int, default=16, help="held-out blocks")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8], help="network calls of a draw")
    arguments = parser.parse_args()
    recipe = read_recipe(str(arguments.run / RECIPE))
    model, data = load_model(str(arguments.run / "model")), load_prepared(data_folder(recipe, arguments.run))
    seen, size = chunks_of_text(data, model.config.chunk_size), model.config.chunk_size
    hidden, truth = positions(model, data, recipe, arguments.blocks)
    print(
        f"{len(truth)} positions; of the true chunks {share_seen(truth, seen):.1%} occur in the training text"
    )
    print("| sampler | calls | T | occurs | next chunk | next token | two agree | draws | FLOPs a token |")
    print("|---|---|---|---|---|---|---|---|---|")
    for steps in arguments.steps:
        model.change_sampling(num_steps=steps)
        for name, sampler in samplers():
            reader = ChunkReader(model, sampler)
            first, second = reader.draw(hidden, 2, torch.Generator().manual_seed(1))
            work = Work(recipe.data.context // size, reader.mean_draws)
            print(
                f"| {name} | {steps} | {sampler.temperature:g} | {share_seen(first, seen):.1%} "
                f"| {share(first == truth):.1%} | {share(first[:, :1] == truth[:, :1]):.1%} "
                f"| {share(first == second):.1%} | {reader.mean_draws:.0f} "
                f"| {sum(cost_of(model.config, work).inference.values()) / 1e6:.1f} M |",
                flush=True,
            )


def samplers() -> Iterator[tuple[str, Sampler]]:
    """All samplers and temperatures, with their names."""
    yield from (("head", HeadSampler(temperature=t)) for t in (1.0, 0.7, 0.5, 0.35))
    yield "exact", ExactSampler(temperature=0.5)


def positions(
    model: CalmForCausalLM, data: PreparedData, recipe: Recipe, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Hidden states before held-out chunks that lie inside documents, (P, D), and those chunks, (P, K)."""
    size = model.config.chunk_size
    states: list[Tensor] = []
    chunks: list[Tensor] = []
    blocks = data.blocks("validation", chunk_size=size, block_size=recipe.data.context, seed=recipe.seed)
    for block in batches_of(blocks, num_blocks):
        with torch.no_grad():
            hidden = model.hidden_states_of_chunks(block["input_ids"], position_ids=block["position_ids"])
        is_target = find_targets(block["labels"], block["position_ids"], size)
        is_target &= (split_into_chunks(block["labels"], size)[:, 1:] >= 0).all(-1)
        states.append(hidden[:, :-1][is_target])
        chunks.append(split_into_chunks(block["input_ids"], size)[:, 1:][is_target])
    return torch.cat(states), torch.cat(chunks)


def chunks_of_text(data: PreparedData, size: int) -> set[tuple[int, ...]]:
    """All runs of K tokens in the training text."""
    return {
        tuple(tokens[start : start + size])
        for tokens in data.train["input_ids"]
        for start in range(len(tokens) - size + 1)
    }


def share_seen(chunks: Tensor, seen: set[tuple[int, ...]]) -> float:
    """Share of chunks that occur in the training text."""
    return sum(tuple(chunk) in seen for chunk in chunks.tolist()) / len(chunks)


def share(equal: Tensor) -> float:
    """Share of rows in which all entries are equal."""
    return equal.all(-1).float().mean().item()


if __name__ == "__main__":
    main()
