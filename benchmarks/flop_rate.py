"""Do half the FLOPs take half the time? FLOPs per second of a training step, of CALMs and of a Transformer.

    python benchmarks/flop_rate.py

A step is forward, backward, clipping and optimizer of a model of prose.py, at its sizes, batch and context,
on random tokens; FLOPs are as counted by `calm flops`. Models take turns in one process, for each number of
threads.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measure import DEVICE, in_turns, machine, ratios
from prose import CONTEXT, MODELS, recipe_of
from torch import Tensor
from training_step import take_step

from calm.flops import training_flops
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmConfig
from calm.models.tokens import LlamaForCausalLM
from calm.training.build import model_config
from calm.training.optimizers import build_optimizer


def step(name: str) -> tuple[Callable[[], Tensor], float]:
    """A function that runs a training step of a model and returns its loss, and the FLOPs of a step."""
    torch.manual_seed(0)
    recipe, kind = recipe_of(name, 1, Path()), MODELS[name]
    config = model_config(recipe)
    is_calm = isinstance(config, CalmConfig)
    model = (CalmForCausalLM if is_calm else LlamaForCausalLM)(config).train().to(DEVICE)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, recipe.language_model.training.optimizer)
    blocks = kind.batch // CONTEXT
    ids = torch.randint(4, config.get_text_config().vocab_size, (blocks, CONTEXT), device=DEVICE)
    positions = torch.arange(CONTEXT // kind.chunk_size, device=DEVICE).expand(blocks, -1)

    def run() -> Tensor:
        return take_step(
            model, optimizer, lambda: model(input_ids=ids, labels=ids, position_ids=positions).loss
        )

    return run, training_flops(config, CONTEXT) * kind.batch


def main() -> None:
    """Print one line per model and number of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["sequential_K4", "sequential_K2"], choices=MODELS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    names = ["baseline", *(name for name in arguments.models if name != "baseline")]
    steps, flops = {}, {}
    for name in names:
        steps[name], flops[name] = step(name)
    print(machine())
    print("| model | threads | ms | GFLOP | GFLOP/s | tokens/s | FLOP rate to the Transformer's |")
    print("|---|---|---|---|---|---|---|")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        table = ratios(in_turns(steps, arguments.rounds, warm_up=3), "baseline")
        for name, (seconds, *speedups) in table.items():
            ratio, least, most = (flops[name] / flops["baseline"] * speedup for speedup in speedups)
            print(
                f"| {MODELS[name].label} | {threads} | {1000 * seconds:.1f} | {flops[name] / 1e9:.2f} "
                f"| {flops[name] / seconds / 1e9:.1f} | {MODELS[name].batch / seconds:,.0f} "
                f"| {ratio:.2f} ({least:.2f} to {most:.2f}) |"
            )


if __name__ == "__main__":
    main()
