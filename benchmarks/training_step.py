"""What does a whole training step cost: forward, backward, clipping and optimizer?

    python benchmarks/training_step.py

It compares our training step, with the published M posterior draws and with the posterior integrated out,
with the same model whose head is written the obvious way: the condition concatenated to every draw, all
differences of the energy loss in memory. Steps take turns, and peak memory is measured in separate processes.
FLOPs are those of our step, as counted by `calm flops`.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from energy import literal as literal_energy_loss
from measure import DEVICE, in_turns, machine, peak_memory, ratios
from torch import Tensor
from torch.nn import functional

from calm.flops import training_flops
from calm.hardware import matrix_rate
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.heads import Target
from calm.models.heads.energy import EnergyHead, EnergyNoise


class LiteralHead(EnergyHead):
    """The same head and loss, written the obvious way."""

    def _loss(self, states_PD: Tensor, target: Target, noise: EnergyNoise) -> Tensor:
        """See `GenerativeHead`."""
        condition = self.condition_norm(self.condition_in(states_PD)).expand(self.config.num_draws, -1, -1)
        x = self.noise_norm(self.noise_in(noise.head))
        block: Any
        for block in self.blocks:
            merged = block.merge(torch.cat([block.norm(x), condition], dim=-1))
            gate, up = block.gate_and_up(functional.silu(block.hidden(functional.silu(merged)))).chunk(
                2, dim=-1
            )
            x = x + block.down(functional.silu(gate) * up)
        draws = self.out(functional.silu(self.out_hidden(self.out_norm(x))))
        targets = target.posterior_PZ.sample(self.config.num_posterior_draws, noise=noise.posterior)
        return literal_energy_loss(draws, targets, self.config.alpha)


def config(num_targets: int) -> CalmConfig:
    """5.8M trained parameters; 6.6M with the autoencoder."""
    return CalmConfig(
        autoencoder_config=CalmAutoencoderConfig(
            vocab_size=4096, chunk_size=4, latent_size=64, hidden_size=128, intermediate_size=320
        ),
        backbone_config={
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
        },
        head_config={"head_type": "energy", "num_blocks": 2, "num_posterior_draws": num_targets},
    )


def take_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, compute_loss: Callable[[], Tensor]
) -> Tensor:
    """Run forward, backward, clipping and optimizer; return the loss."""
    optimizer.zero_grad()
    loss = compute_loss()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def step(name: str, batch: int, tokens: int, compiled: bool = False) -> Callable[[], Tensor]:
    """A function that runs a training step of one kind and returns its loss."""
    torch.manual_seed(0)
    model = CalmForCausalLM(config(0 if name == "integrated" else 100)).train().to(DEVICE)  # type: ignore[arg-type]
    with torch.no_grad():
        model.head.out.weight.normal_(std=0.02)
    if name == "literal":
        model.head.__class__ = LiteralHead
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(4, 4096, (batch, tokens), device=DEVICE)
    positions = batch * (tokens // 4 - 1)
    forward = torch.compile(model) if compiled else model

    def run() -> Tensor:
        noise = EnergyNoise(
            torch.rand(8, positions, 64, device=DEVICE) - 0.5,
            None if name == "integrated" else torch.randn(100, positions, 64, device=DEVICE),
        )
        return take_step(model, optimizer, lambda: forward(ids, labels=ids, noise=noise).loss)

    return run


def main() -> None:
    """Print one line per kind of step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="add our way under torch.compile")
    arguments = parser.parse_args()
    sizes = arguments.batch, arguments.tokens
    kinds: dict[str, tuple[Any, ...]] = {name: (name, *sizes) for name in ("literal", "ours", "integrated")}
    if arguments.compile:
        kinds["compiled"] = ("ours", *sizes, True)
        kinds["integrated, compiled"] = ("integrated", *sizes, True)
    steps = {name: step(*kind) for name, kind in kinds.items()}
    for name in ("literal", "ours"):
        torch.manual_seed(1)
        print(f"{name}: loss of the first step {steps[name]():.5f}")
    table = ratios(in_turns(steps, arguments.rounds), "literal")
    memory = {name: peak_memory(step, *kind) for name, kind in kinds.items()}
    flops = training_flops(config(100), arguments.tokens) * arguments.batch * arguments.tokens
    rate = matrix_rate(torch.device(DEVICE), torch.float32) or math.nan
    print(f"{machine()}; {sizes[0]} x {sizes[1]} tokens, {flops / 1e9:.0f} GFLOP a step of ours, ")
    print(f"matrix products alone reach {rate / 1e9:.0f} GFLOP/s")
    print("| way | ms | times as fast | tokens/s | of the matrix rate | memory |\n|---|---|---|---|---|---|")
    for name, (seconds, ratio, least, most) in table.items():
        print(
            f"| {name} | {1000 * seconds:.0f} | {ratio:.2f} ({least:.2f} to {most:.2f}) | "
            f"{sizes[0] * sizes[1] / seconds:,.0f} | {flops / seconds / rate:.0%} | "
            f"{memory[name] / 2**20:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
