"""Does BrierLM follow nats, both for a model trained by cross-entropy and for one that was not?

    python benchmarks/brier_and_nats.py --output runs/follow --results benchmarks/results/brier_and_nats

Two CALMs of the embedded stories, one with the sequential head (cross-entropy) and one with the energy head
(the energy score of drawn latents), are trained further and further and scored on held-out stories each time.

The energy head has no likelihood. But each of its draws is decoded into distributions of K tokens. If tokens
were drawn from those, instead of taking the likeliest, the model would be a mixture whose likelihood is the
mean over draws of the product of the K probabilities. Estimated from N draws, its nats are too high, the less
so the larger N.

Finished runs and results are kept, so an interrupted benchmark resumes. Without `--output`, the table and the
figure are made from existing results.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import json_rows, machine
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from calm.data.prepared import load_prepared
from calm.data.stories import write_stories
from calm.evaluation.held_out import score_brier, score_perplexity
from calm.models.calm import CalmForCausalLM
from calm.models.loading import load_model
from calm.report.panels import new_figure
from calm.report.tables import with_error
from calm.storage.disk import write_atomically
from calm.training.recipe_files import RECIPE, read_recipe, with_settings
from calm.training.stages import train

RECIPES = {"sequential": "demo_sequential", "energy": "demo"}
STEPS = {"sequential": (60, 120, 240, 480, 960), "energy": (80, 160, 320, 640)}
NUM_STORIES, NUM_BLOCKS = 4000, 48
NUM_BLOCKS_OF_DRAWS = 16  # Few, because decoding 256 draws of each chunk takes long.
NUM_DRAWS = (16, 64, 256)
LOGITS_AT_ONCE = 2**25
Row = dict[str, Any]


def main() -> None:
    """Train and score whatever is missing, then print the table and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of runs; without, nothing is trained")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results/brier_and_nats")
    parser.add_argument("--heads", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--figure", type=Path, help="where the figure is drawn, a PNG")
    arguments = parser.parse_args()
    for head in arguments.heads if arguments.output else ():
        for steps in STEPS[head]:
            file = arguments.results / f"{head}_{steps:04}.json"
            if not file.exists():
                row = {"head": head, "steps": steps, **measure(head, steps, arguments.output.resolve())}
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json_rows({**row, "machine": machine()}) + "\n")
    rows = [json.loads(file.read_text()) for file in sorted(arguments.results.glob("*.json"))]
    print(table(rows))
    if arguments.figure:
        draw(rows, arguments.figure)


def measure(head: str, steps: int, output: Path) -> Row:
    """Train a model up to a number of steps, and score it."""
    text, run = output / "stories.jsonl", output / head
    if not text.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_stories(text, 0, NUM_STORIES)
    recipe = with_settings(
        read_recipe(RECIPES[head]),
        {
            "data.sources": str(text),
            "data.num_proc": 1,
            "language_model.training.steps": steps,
            "language_model.training.evaluate_every": 0,
            "language_model.training.optimizer.schedule": "constant",  # A longer run continues a shorter one.
        },
    )
    print(f"{head}: {steps} steps", flush=True)
    train(recipe, run, resume=(run / RECIPE).is_file())
    model: Any = load_model(str(run / "model")).eval()
    blocks = load_prepared(run / "data").blocks(
        "validation", chunk_size=model.config.chunk_size, block_size=recipe.data.context
    )
    brier = score_brier(model, blocks, NUM_BLOCKS, num_draws=8, estimator="draws")
    row = {"brier_lm": brier.brier_lm, "error": brier.brier_lm_error}
    if head == "sequential":
        return {**row, "nats": score_perplexity(model, blocks, NUM_BLOCKS).cross_entropy}
    by_number = {number: nats_of_draws(model, blocks, number) for number in NUM_DRAWS}
    return {**row, "nats": by_number[max(NUM_DRAWS)], "nats_by_draws": list(by_number.values())}


def nats_of_draws(model: CalmForCausalLM, blocks: Any, num_draws: int) -> float:
    """Nats per token of the mixture of the distributions that `num_draws` draws decode to."""
    head: Any = model.head
    head.token_losses = partial(losses_of_draws, model, num_draws)
    head.token_probabilities = head.token_losses  # A head with both attributes counts as having a likelihood.
    try:
        return score_perplexity(model, blocks, NUM_BLOCKS_OF_DRAWS).cross_entropy
    finally:
        del head.token_losses, head.token_probabilities


def losses_of_draws(model: CalmForCausalLM, num_draws: int, states_PD: Tensor, tokens_PK: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it in the chunk, (P, K)."""
    head: Any = model.head
    randomness = torch.Generator().manual_seed(1)
    at_once = max(1, LOGITS_AT_ONCE // (num_draws * tokens_PK.shape[1] * model.config.vocab_size))
    losses = []
    for part_PD, part_PK in zip(states_PD.split(at_once), tokens_PK.split(at_once), strict=True):
        latents_NPZ = head.sample_latents(part_PD, num_draws, randomness)
        logits_NPKV = model.autoencoder.decode(latents_NPZ).float()
        targets_NPK1 = part_PK.expand(num_draws, -1, -1).unsqueeze(-1)
        normalizers_NPK1 = logits_NPKV.logsumexp(-1, keepdim=True)
        log_p_NPK = (logits_NPKV.gather(-1, targets_NPK1) - normalizers_NPK1).squeeze(-1)
        prefix_PK = log_p_NPK.cumsum(-1).logsumexp(0) - math.log(num_draws)
        losses.append(-prefix_PK.diff(dim=-1, prepend=torch.zeros_like(prefix_PK[:, :1])))
    return torch.cat(losses)


def table(rows: list[Row]) -> str:
    """All scores, and their correlation for each head."""
    lines = ["| head | steps | BrierLM | nats | nats by 16, 64, 256 draws |", "|" + "---|" * 5]
    for row in rows:
        numbers = ", ".join(f"{nats:.2f}" for nats in row.get("nats_by_draws", []))
        score = with_error(row["brier_lm"], row["error"])
        lines.append(f"| {row['head']} | {row['steps']} | {score} | {row['nats']:.2f} | {numbers} |")
    for head in RECIPES:
        if len(chosen := [row for row in rows if row["head"] == head]) > 2:
            scores, nats = ([row[name] for row in chosen] for name in ("brier_lm", "nats"))
            pearson, spearman = pearsonr(scores, nats).statistic, spearmanr(scores, nats).statistic
            lines.append(
                f"\n{head}: correlation over {len(chosen)} lengths of training {pearson:.3f}, "
                f"of ranks {spearman:.2f}"
            )
    return "\n".join(lines)


def draw(rows: list[Row], figure: Path) -> None:
    """Plot BrierLM against nats, one panel per head."""
    drawing = new_figure(10, 4)
    for axes, head in zip(drawing.subplots(1, 2, sharey=True), RECIPES, strict=True):
        chosen = [row for row in rows if row["head"] == head]
        scores, errors, nats = ([row[name] for row in chosen] for name in ("brier_lm", "error", "nats"))
        axes.errorbar(nats, scores, yerr=errors, marker="o", markersize=4, capsize=2)
        for row in chosen:
            point = (row["nats"], row["brier_lm"])
            axes.annotate(f" {row['steps']}", point, fontsize="small", va="bottom")
        title = f"{head} head, by steps of training"
        axes.set(xlabel="held-out nats per token", ylabel="BrierLM", title=title)
        axes.grid(alpha=0.3)
        axes.invert_xaxis()
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure, dpi=120, facecolor="white")


if __name__ == "__main__":
    main()
