"""What is a teacher worth at equal steps, and what does it cost?

    python benchmarks/teacher.py --folder runs/teacher

A small Transformer is trained on the embedded stories. CALMs with chunks of four tokens are made of it, and
trained with it as their teacher or without; so are new CALMs with the sequential head and the same tokens. It
prints held-out nats per token by step, and CPU seconds per step (forward and backward on one thread), which
do not depend on what else the machine does. Finished runs are not repeated.
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
    """Records the CPU time of losses and their gradients."""

    seconds: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a batch, and record the time."""
        start = time.process_time()
        loss = super().training_step(*args, **kwargs)
        self.seconds.append(time.process_time() - start)
        return loss


def trained(recipe: Recipe, folder: Path) -> tuple[dict[int, float], float]:
    """Held-out nats of a run by step, and the median seconds of a step."""
    times = folder / "seconds.json"
    if not times.exists():
        TimedTrainer.seconds.clear()
        stages.train(recipe, folder, resume=(folder / RECIPE).is_file())
        seconds = sorted(TimedTrainer.seconds)
        times.write_text(json.dumps(seconds[len(seconds) // 2]))
    history = json.loads((folder / "history.json").read_text())["language_model"]
    nats = {e["step"]: e["eval_cross_entropy"] for e in history if "eval_cross_entropy" in e}
    return nats, json.loads(times.read_text())


def main() -> None:
    """Train whatever is missing, and print the table."""
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
    for kind, student in (("uptrained", UPTRAINED | {"language_model.init_from": source}), ("new", NEW)):
        for name, weights in TEACHERS.items():
            if kind == "new" and "states" in weights:
                continue
            teacher = {f"language_model.teacher.{key}": value for key, value in weights.items()}
            recipe = with_settings(base, student | teacher | {"language_model.teacher.model": source})
            rows[f"{kind}, {name}"] = trained(recipe, folder / f"{kind} {name}".replace(" ", "_"))
    for name, (nats, seconds) in rows.items():
        by_step = "  ".join(f"{step} {value:.3f}" for step, value in nats.items())
        print(f"{name:<28} {seconds:.3f} s a step; nats at {by_step}")


if __name__ == "__main__":
    main()
