"""What is a teacher worth at equal steps, and what does it cost?

    python benchmarks/teacher.py --folder runs/teacher

A small Transformer is trained on the embedded stories. It is cut into CALMs of four tokens, which are trained
with it as teacher and without; so are new CALMs with the sequential head and its tokens. Printed are nats a
token on held-out text by step, and seconds of the processor for a step (forward and backward, of one thread):
what else the machine does is no part of them. Runs that are there are not trained again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from calm.data.stories import write_stories
from calm.training import stages
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, read_recipe, with_settings
from calm.training.trainer import ChunkTrainer

SHARED = {
    "data.vocab_size": 1024,
    "data.context": 256,
    "data.validation_fraction": 0.05,
    "data.num_proc": 1,
    "language_model.hidden_size": 96,
    "language_model.intermediate_size": 256,
    "language_model.num_heads": 4,
    "language_model.training.batch_tokens": 1024,
    "language_model.training.log_every": 10,
    "language_model.training.save_every": 0,
    "language_model.training.evaluation_blocks": 40,
}
SOURCE = {
    "model": "autoregressive",
    "chunk_size": 1,
    "language_model.num_layers": 6,
    "language_model.training.steps": 500,
    "language_model.training.evaluate_every": 0,
}
STUDENT = {
    "language_model.training.steps": 240,
    "language_model.training.evaluate_every": 60,
    "language_model.training.optimizer.warmup_steps": 20,
    "language_model.training.optimizer.schedule": "constant",
}
UPTRAINED = STUDENT | {
    "language_model.uptraining.first_layers": 1,
    "language_model.uptraining.last_layers": 2,
    "language_model.training.optimizer.name": "adamw",
    "language_model.training.optimizer.learning_rate": 1e-3,
}
NEW = STUDENT | {
    "autoencoder.kind": "codes",
    "autoencoder.latent_size": 64,
    "language_model.num_layers": 3,
    "language_model.head": {"head_type": "sequential", "num_blocks": 2, "rank": 48, "token_size": 48},
}
TEACHERS: dict[str, dict[str, float]] = {
    "text alone": {"weight": 0.0},
    "half of each": {"weight": 0.5},
    "teacher alone": {"weight": 1.0},
    "and its states": {"weight": 1.0, "states": 1.0},
}


class TimedTrainer(ChunkTrainer):
    """Notes the processor's time in losses and their gradients."""

    seconds: list[float] = []

    def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
        """One batch."""
        begun = time.process_time()
        loss = super().training_step(*arguments, **more)
        self.seconds.append(time.process_time() - begun)
        return loss


def trained(recipe: Recipe, folder: Path) -> tuple[dict[int, float], float]:
    """Held-out nats by step of a run, and seconds of a step."""
    times = folder / "seconds.json"
    if not times.exists():
        TimedTrainer.seconds.clear()
        stages.train(recipe, folder, resume=(folder / RECIPE).is_file())
        of_steps = sorted(TimedTrainer.seconds)
        times.write_text(json.dumps(of_steps[len(of_steps) // 2]))
    history = json.loads((folder / "history.json").read_text())["language_model"]
    nats = {e["step"]: e["eval_cross_entropy"] for e in history if "eval_cross_entropy" in e}
    return nats, json.loads(times.read_text())


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--stories", type=int, default=3000)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    torch.set_num_threads(1)
    stages.ChunkTrainer = TimedTrainer  # type: ignore[misc]
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "stories.jsonl"
    if not text.exists():
        write_stories(text, 0, arguments.stories)
    base = with_settings(read_recipe("demo"), SHARED | {"data.sources": str(text)})
    rows = {"source": trained(with_settings(base, SOURCE), folder / "source")}
    source = str(folder / "source/model")
    for kind, own in (("uptrained", UPTRAINED | {"language_model.init_from": source}), ("new", NEW)):
        for name, how in TEACHERS.items():
            if kind == "new" and "states" in how:
                continue
            settings = {f"language_model.teacher.{part}": value for part, value in how.items()}
            recipe = with_settings(base, own | settings | {"language_model.teacher.model": source})
            rows[f"{kind}, {name}"] = trained(recipe, folder / f"{kind} {name}".replace(" ", "_"))
    for name, (nats, seconds) in rows.items():
        by_step = "  ".join(f"{step} {value:.3f}" for step, value in nats.items())
        print(f"{name:<28} {seconds:.3f} s a step; nats at {by_step}")


if __name__ == "__main__":
    main()
