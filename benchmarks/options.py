"""What does each option of a recipe cost or save in a training step?

    python benchmarks/options.py
    python benchmarks/options.py --batch 1 --tokens 16384 --ways reference checkpointing "eager attention"

It trains the model of training_step.py with the integrated energy loss, with options in turns in one process;
peak memory is measured in separate processes. The reference has the defaults of a recipe: float32, sdpa
attention, no compilation, no checkpointing; but AdamW, fused, as its optimizer. Each option changes one
thing.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import DEVICE, in_turns, machine, peak_memory, ratios
from torch import Tensor
from training_step import config, take_step

from calm.models.calm import CalmForCausalLM
from calm.training.optimizers import build_optimizer
from calm.training.recipe import OptimizerSettings

WAYS: dict[str, dict[str, Any]] = {
    "reference": {},
    "compile": {"compile": True},
    "bf16": {"precision": "bf16"},
    "bf16, compile": {"precision": "bf16", "compile": True},
    "AdamW not fused": {"fused": False},
    "muon": {"optimizer": "muon"},
    "checkpointing": {"checkpointing": True},
    "eager attention": {"attention": "eager"},
}


def step(
    batch: int,
    tokens: int,
    precision: str = "fp32",
    compile: bool = False,
    fused: bool = True,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    attention: str = "sdpa",
) -> Callable[[], Tensor]:
    """A function that runs an optimizer step with the given options and returns the loss."""
    torch.manual_seed(0)
    settings = config(0)
    settings.backbone.max_position_embeddings = max(1024, tokens)
    settings._attn_implementation = attention
    model = CalmForCausalLM(settings).train().to(DEVICE)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.out.weight, std=0.02)
    if checkpointing:
        model.gradient_checkpointing_enable()
    # Small rates: diverging weights give denormal gradients, which are slow on a CPU.
    updates = build_optimizer(
        model, OptimizerSettings(name=optimizer, learning_rate=1e-4, adamw_learning_rate=1e-4)
    )
    if not fused:
        for group in updates.param_groups:
            group["fused"] = False
    ids = torch.randint(4, 4096, (batch, tokens), device=DEVICE)
    forward = torch.compile(model) if compile else model

    def compute_loss() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            return forward(ids, labels=ids).loss

    def run() -> Tensor:
        return take_step(model, updates, compute_loss)

    return run


def main() -> None:
    """Print one line per option."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    names = ["reference", *(name for name in arguments.ways if name != "reference")]
    sizes = arguments.batch, arguments.tokens
    steps = {name: step(*sizes, **WAYS[name]) for name in names}
    table = ratios(in_turns(steps, arguments.rounds), "reference")
    print(f"{machine()}; {sizes[0]} x {sizes[1]} tokens")
    print("| option | ms | times as fast | peak memory |\n|---|---|---|---|")
    for name, (seconds, ratio, least, most) in table.items():
        memory = peak_memory(step_with, name, *sizes)
        print(
            f"| {name} | {1000 * seconds:.0f} | {ratio:.2f} ({least:.2f} to {most:.2f}) | "
            f"{memory / 2**20:.0f} MiB |"
        )


def step_with(name: str, batch: int, tokens: int) -> Callable[[], Tensor]:
    """`step` with the options of one of `WAYS`."""
    return step(batch, tokens, **WAYS[name])


if __name__ == "__main__":
    main()
