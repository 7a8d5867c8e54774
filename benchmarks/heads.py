"""Which head learns best with equal FLOPs and in equal time, and how fast does each one draw?

    calm compare --recipe demo --budget 0.7 --chunk_sizes '[4]' --no_baseline --output runs/ladder
    python benchmarks/heads.py runs/ladder/K4 --output runs/heads

Each given run is one seed, and its energy head sets the budget. Each other head is trained with the run's
text, autoencoder, backbone and optimizer, for as many steps as the FLOPs allow; and again for as many as the
time allows, if the two differ by more than 15%, which is the spread of step times. Step times are measured
first, in turns in this process. Then all models are scored on the same held-out blocks with several ways of
drawing, and timed. Finished runs and results are kept, so an interrupted benchmark resumes.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import in_turns, json_rows

from calm.data.prepared import load_prepared
from calm.evaluation.held_out import score_brier
from calm.flops import training_flops
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmConfig
from calm.models.heads import LatentHead
from calm.models.loading import load_config
from calm.training.build import language_model_config
from calm.training.optimizers import build_optimizer
from calm.training.recipe import Recipe, TrainingSettings
from calm.training.recipe_files import RECIPE, read_recipe
from calm.training.stages import train

HEADS: dict[str, dict[str, Any] | None] = {
    "energy": None,  # The head of the run.
    "flow": {"head_type": "flow", "num_blocks": 1},
    "diffusion": {"head_type": "diffusion", "num_blocks": 1},
}
WAYS: dict[str, list[dict[str, Any]]] = {
    "energy": [{}],
    "flow": [
        {"solver": "euler", "num_steps": 1},
        {"solver": "euler", "num_steps": 4},
        {"solver": "midpoint", "num_steps": 1},
        {"solver": "midpoint", "num_steps": 2},
        {"solver": "midpoint", "num_steps": 4},
        {"solver": "midpoint", "num_steps": 10},
    ],
    "diffusion": [
        {"sampler": "ancestral", "num_steps": 25},
        {"sampler": "ancestral", "num_steps": 100},
        {"sampler": "ddim", "num_steps": 25},
        {"sampler": "dpm", "num_steps": 15},
    ],
}
POSITIONS, DRAWS = 64, 16
Row = dict[str, Any]  # Results of a model with one way of drawing.
Speeds = dict[tuple[str, str], tuple[float, float, float]]  # Head, way -> draws per second: median, min, max.


def main() -> None:
    """Train whatever is missing, score, time, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="runs with an energy head, one for each seed")
    parser.add_argument("--output", type=Path, default=Path("runs/heads"))
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.heads = ["energy", *(name for name in arguments.heads if name != "energy")]
    arguments.output.mkdir(parents=True, exist_ok=True)
    seeds = [seed_of(run) for run in arguments.runs]
    if len(set(seeds)) < len(seeds):
        parser.error(f"the runs must have different seeds, got {', '.join(seeds)}.")
    recipes = [recipe_with(run, None) for run in arguments.runs]
    per_step = {name: training_flops_of(arguments.runs[0], name) for name in arguments.heads}
    seconds = step_times(arguments)
    for name in arguments.heads:
        print(
            f"{name}: FLOPs of a step {per_step[name] / per_step['energy']:.2f}, "
            f"time of a step {seconds[name] / seconds['energy']:.2f} times those of the energy head"
        )
    rows: list[Row] = []
    for run, recipe in zip(arguments.runs, recipes, strict=True):
        steps = recipe.language_model.training.steps
        for name in arguments.heads:
            budgets = {
                "flops": round(steps * per_step["energy"] / per_step[name]),
                "time": round(steps * seconds["energy"] / seconds[name]),
            }
            if abs(budgets["time"] / budgets["flops"] - 1) <= 0.15:
                budgets = {"both": budgets["flops"]}
            for budget, num_steps in budgets.items():
                folder = arguments.output / f"{seed_of(run)}_{name}_{budget}"
                model = run / "model" if name == "energy" else trained(run, name, num_steps, folder)
                rows += scored(model, run, name, budget, num_steps, arguments.output)
    speeds = draw_speeds(arguments, rows)
    report(rows, speeds, arguments.output)


def seed_of(run: Path) -> str:
    """A name for a run: the seed of its recipe."""
    return f"seed{read_recipe(str(run / RECIPE)).seed}"


def recipe_with(run: Path, head: dict[str, Any] | None, steps: int | None = None) -> Recipe:
    """The recipe of a run, with its text and autoencoder but another head."""
    recipe = read_recipe(str(run / RECIPE))
    model = recipe.language_model
    training = dataclasses.replace(model.training, evaluate_every=0, save_every=100)
    if steps is not None:
        training = dataclasses.replace(training, steps=steps)
    return dataclasses.replace(
        recipe,
        autoencoder=dataclasses.replace(recipe.autoencoder, path=str(run / "autoencoder")),
        language_model=dataclasses.replace(model, head=head or model.head, training=training),
    )


def config_of(run: Path, name: str) -> CalmConfig:
    """Configuration of a run's model with one of the heads."""
    recipe = recipe_with(run, HEADS[name])
    autoencoder: Any = load_config(run / "autoencoder")
    return language_model_config(recipe, autoencoder, {})


def training_flops_of(run: Path, name: str) -> float:
    """Training FLOPs per token with one of the heads."""
    return training_flops(config_of(run, name), recipe_with(run, None).data.context)


def step_times(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of an optimizer step of each head, taken in turns."""
    run = arguments.runs[0]
    path = arguments.output / f"step_times_{seed_of(run)}_{'_'.join(arguments.heads)}.json"
    if path.is_file():
        return json.loads(path.read_text())
    recipe = recipe_with(run, None)
    training = recipe.language_model.training
    blocks = load_prepared(Path(recipe.data.source_list[0])).blocks(
        "train", chunk_size=recipe.chunk_size, block_size=recipe.data.context
    )[: training.batch_tokens // recipe.data.context]
    del blocks["document_ids"]  # Needed for scores only.
    steps = {name: step_of(config_of(run, name), training, blocks) for name in arguments.heads}
    times = in_turns(steps, arguments.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print({name: [round(t, 3) for t in sorted(seconds)] for name, seconds in times.items()})
    path.write_text(json.dumps(medians))
    return medians


def step_of(config: CalmConfig, training: TrainingSettings, blocks: dict[str, Any]) -> Callable[[], None]:
    """A function that runs an optimizer step of a new model."""
    model = CalmForCausalLM(config).train()
    optimizer = build_optimizer(model, training.optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(**blocks, use_cache=False).loss.backward()
        optimizer.step()

    return step


def trained(run: Path, name: str, steps: int, folder: Path) -> Path:
    """Train a head for a number of steps, and return the model folder."""
    return train(recipe_with(run, HEADS[name], steps), folder, resume=(folder / RECIPE).is_file())


def scored(folder: Path, run: Path, name: str, budget: str, steps: int, output: Path) -> list[Row]:
    """BrierLM of a model with each way of drawing; kept in a file."""
    path = output / f"{seed_of(run)}_{name}_{budget}.json"
    if path.is_file():
        return json.loads(path.read_text())
    recipe = read_recipe(str(run / RECIPE))
    data = load_prepared(Path(recipe.data.source_list[0]))
    blocks = data.blocks("validation", chunk_size=recipe.chunk_size, block_size=recipe.data.context)
    model = CalmForCausalLM.from_pretrained(folder)
    rows: list[Row] = []
    for way in WAYS[name]:
        model.change_sampling(**way)
        result = score_brier(model, blocks)
        rows.append(
            {"seed": seed_of(run), "head": name, "equal": budget, "steps": steps, "way": way}
            | {"folder": str(folder), "brier_lm": result.brier_lm, "error": result.brier_lm_error}
            | {"means": result.means, "windows": result.num_chunks}
        )
        print({key: rows[-1][key] for key in ("seed", "head", "equal", "steps", "way", "brier_lm", "error")})
    path.write_text(json_rows(rows) + "\n")
    return rows


def draw_speeds(arguments: argparse.Namespace, rows: list[Row]) -> Speeds:
    """Draws per second of each head with each way of drawing, measured in turns."""
    ways: dict[tuple[str, str], str] = {}
    for row in rows:
        ways.setdefault((row["head"], json.dumps(row["way"])), row["folder"])
    models = {folder: CalmForCausalLM.from_pretrained(folder) for folder in set(ways.values())}
    hidden = torch.randn(POSITIONS, next(iter(models.values())).config.hidden_size)

    @torch.no_grad()
    def draw(way: tuple[str, str], folder: str) -> None:
        models[folder].change_sampling(**json.loads(way[1]))
        head = models[folder].head
        assert isinstance(head, LatentHead)
        head.sample_latents(hidden, DRAWS)

    times = in_turns({way: partial(draw, way, folder) for way, folder in ways.items()}, arguments.rounds)
    rates = {way: [POSITIONS * DRAWS / duration for duration in seconds] for way, seconds in times.items()}
    return {way: (statistics.median(values), min(values), max(values)) for way, values in rates.items()}


def report(rows: list[Row], speeds: Speeds, output: Path) -> None:
    """Print one line per head and way of drawing, with the scores of all seeds."""
    energy = next(speed for (head, _), (speed, _, _) in speeds.items() if head == "energy")
    lines = [
        "| head | drawn | equal FLOPs | equal time | draws/s | to energy |",
        "|---|---|---|---|---|---|",
    ]
    for name, ways in WAYS.items():
        for way in ways:
            same = [row for row in rows if (row["head"], row["way"]) == (name, way)]
            if same:
                speed, low, high = speeds[name, json.dumps(way)]
                drawn = " ".join(str(value) for value in way.values())
                cells = [name, drawn, *(scores_of(same, budget) for budget in ("flops", "time"))]
                cells += [f"{speed:,.0f} ({low:,.0f} to {high:,.0f})", f"{speed / energy:.2g}"]
                lines.append(f"| {' | '.join(cells)} |")
    (output / "heads.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def scores_of(rows: list[Row], budget: str) -> str:
    """BrierLM of every seed, and the steps, at one of the budgets."""
    chosen = [row for row in rows if row["equal"] in (budget, "both")]
    scores = ", ".join(f"{row['brier_lm']:.2f} ± {row['error']:.2f}" for row in chosen)
    steps = ", ".join(sorted({str(row["steps"]) for row in chosen}))
    return f"{scores} ({steps} steps)"


if __name__ == "__main__":
    main()
