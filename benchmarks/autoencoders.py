"""Which autoencoder produces latents that a language model can learn well?

    python benchmarks/autoencoders.py --output runs/autoencoders

A CALM with the energy head, K = 4, is trained on the embedded stories with each of several autoencoders: with
attention, with more or fewer dimensions, with a larger KL weight, aligned with language in two ways, or
trained jointly with the language model. Each changes one thing; data, sizes, steps and rates are in
`autoencoders_training.py`.

Finished runs and results are kept, so an interrupted benchmark resumes. Without `--output`, the table is
printed from existing results.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from autoencoders_training import (
    LAST_STEPS,
    STEPS,
    Align,
    Joint,
    NextChunk,
    Objective,
    attend,
    batches_of,
    prepared_stories,
    recipe_of,
    teacher_of,
    train_autoencoder,
    train_language_model,
    with_autoencoder,
)
from measure import brier_scores, error_over_seeds, json_rows, machine

from calm.data.prepared import PreparedData
from calm.evaluation.held_out import score_brier, score_reconstruction
from calm.models.autoencoder import CalmAutoencoder
from calm.report.tables import with_error
from calm.storage.disk import write_atomically
from calm.training.build import new_autoencoder, new_language_model

NUM_BLOCKS, NUM_DRAWS = 96, 8
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Way:
    """An autoencoder, and how it is trained.

    Args:
        label: Label of its row in the table.
        settings: Recipe settings that differ from the shared ones.
        attends: Whether tokens of a chunk attend to each other.
        aligned: What its latents are aligned with, if anything.
        joint: How it is trained together with the language model; None freezes it.
        steps: Steps for which it is trained alone, before the language model.
    """

    label: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    attends: bool = False
    aligned: str | None = None
    joint: Joint | None = None
    steps: int = STEPS


WAYS = {
    "mlp": Way("as published: MLPs, 48 dimensions"),
    "attention": Way("attention among a chunk's tokens", attends=True),
    "Z8": Way("8 dimensions", {"autoencoder.latent_size": 8}),
    "Z16": Way("16 dimensions", {"autoencoder.latent_size": 16}),
    "Z96": Way("96 dimensions", {"autoencoder.latent_size": 96}),
    "kl": Way(
        "KL weight 0.03 instead of 0.001, no floor",
        {"autoencoder.kl_weight": 0.03, "autoencoder.kl_floor": 0.0},
    ),
    "next": Way("latents tell the next chunk as well", aligned="next"),
    "state": Way("latents tell a Transformer's state after the chunk", aligned="state"),
    "codes": Way(
        "codes, nothing trained", {"autoencoder.kind": "codes", "autoencoder.latent_size": 64}, steps=0
    ),
    "longer": Way("trained for longer, by the steps of the next two", steps=STEPS + LAST_STEPS),
    "beside": Way(
        "goes on learning beside the language model, at a tenth of the rates", joint=Joint(weight=0.0)
    ),
    "joint": Way("goes on, and learns to be predicted as well", joint=Joint(weight=0.1)),
    "scratch": Way("both from scratch, and it learns to be predicted", joint=Joint(0.1, rate=1.0), steps=0),
}


def main() -> None:
    """Train and score whatever is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of text and weights; without, nothing is trained")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/autoencoders")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    arguments = parser.parse_args()
    if arguments.output:
        data = prepared_stories(arguments.output.resolve())
        for seed in arguments.seeds:
            for name in arguments.ways:
                file = arguments.results / f"{name}_seed{seed}.json"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    row = measure(name, seed, data, arguments.output.resolve())
                    write_atomically(file, json_rows(row) + "\n")
                    print(f"{name}, seed {seed}: {row}", flush=True)
    print(table([json.loads(file.read_text()) for file in sorted(arguments.results.glob("*.json"))]))


def measure(name: str, seed: int, data: PreparedData, output: Path) -> Row:
    """Train an autoencoder and the language model on it, and score both."""
    way = WAYS[name]
    recipe = recipe_of(seed, way.settings)
    autoencoder = trained_autoencoder(way, seed, data, output)
    start = time.perf_counter()
    model = with_autoencoder(new_language_model(recipe, data, new_autoencoder(recipe, data)), autoencoder)
    batches = batches_of(data, recipe, "language_model", seed)
    train_language_model(model, recipe, batches, way.joint, seed)
    seconds = time.perf_counter() - start
    model.eval()
    blocks = data.blocks("validation", chunk_size=recipe.chunk_size, block_size=recipe.data.context)
    brier = score_brier(model, blocks, NUM_BLOCKS, num_draws=NUM_DRAWS, estimator="draws")
    return {
        "way": name,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in autoencoder.parameters()),
        "latent_size": autoencoder.config.latent_size,
        "reconstructed": score_reconstruction(autoencoder, blocks, NUM_BLOCKS).token_accuracy,
        "bits": bits_of(autoencoder, blocks),
        **brier_scores(brier),
        "seconds": seconds,
        "machine": machine(),
    }


def trained_autoencoder(way: Way, seed: int, data: PreparedData, output: Path) -> CalmAutoencoder:
    """The autoencoder of a way before the language model is trained; ways that agree up to there share it."""
    recipe = recipe_of(seed, way.settings)
    autoencoder = new_autoencoder(recipe, data)
    if way.attends:
        attend(autoencoder)
    if not way.steps:
        return autoencoder
    alone = dataclasses.replace(way, label="", joint=None)
    name = next(
        name for name, other in WAYS.items() if dataclasses.replace(other, label="", joint=None) == alone
    )
    file = output / "weights" / f"{name}_seed{seed}.pt"
    if file.exists():
        autoencoder.load_state_dict(torch.load(file))
        return autoencoder
    objective: Objective | None = None
    if way.aligned == "next":
        objective = NextChunk(autoencoder)
    elif way.aligned == "state":
        objective = Align(autoencoder, teacher_of(data, output))
    train_autoencoder(
        autoencoder, recipe, batches_of(data, recipe, "autoencoder", seed), way.steps, objective, seed
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(autoencoder.state_dict(), file)
    return autoencoder


@torch.no_grad()
def bits_of(autoencoder: CalmAutoencoder, blocks: Any) -> float | None:
    """Mean bits of a held-out chunk's latent: the divergence of its posterior from a standard normal.

    None for codes, whose posteriors are points.
    """
    if autoencoder.config.has_codes:
        return None
    tokens, labels = (
        blocks[:NUM_BLOCKS][name].view(-1, autoencoder.config.chunk_size) for name in ("input_ids", "labels")
    )
    complete = tokens[(labels >= 0).all(-1)]
    return autoencoder.eval().encode(complete).kl_to_standard_normal().sum(-1).mean().item() / math.log(2)


def table(rows: list[Row]) -> str:
    """One line per way, with means over seeds."""
    lines = [
        "| autoencoder | seeds | parameters | reconstructed | bits of a latent | a dimension | BrierLM |",
        "|" + "---|" * 7,
    ]
    for name, way in WAYS.items():
        if not (same := [row for row in rows if row["way"] == name]):
            continue
        scores, accuracies = ([row[key] for row in same] for key in ("brier_lm", "reconstructed"))
        error = error_over_seeds(scores, [row["error"] for row in same])
        size, bits = same[0]["latent_size"], [row["bits"] for row in same]
        per_latent = "" if bits[0] is None else f"{statistics.mean(bits):.0f}"
        per_dimension = "" if bits[0] is None else f"{statistics.mean(bits) / size:.1f}"
        lines.append(
            f"| {way.label} | {len(same)} | {same[0]['parameters'] / 1e6:.2f} M "
            f"| {100 * statistics.mean(accuracies):.1f}% | {per_latent} | {per_dimension} "
            f"| {with_error(statistics.mean(scores), error)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
