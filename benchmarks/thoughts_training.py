"""Training of the models of thoughts.py: the ways, their settings, and the chain of models of each way."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from calm.data.tasks import items
from calm.data.tokenizer import train_tokenizer
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.models.tokens import LlamaForCausalLM
from calm.storage.disk import write_atomically
from calm.training.build import (
    autoencoder_config,
    autoregressive_config,
    language_model_config,
    special_tokens_of,
)
from calm.training.finetuning import finetune
from calm.training.finetuning_recipe import AnswerSettings, ExampleSettings, FinetuningRecipe, ThoughtSettings
from calm.training.recipe import (
    AutoencoderSettings,
    LanguageModelSettings,
    OptimizerSettings,
    Recipe,
    TrainingSettings,
)

HOPS = {"path": (1, 2, 3, 4), "chain": (1, 2, 3), "graph": (1, 2, 3)}
NUM_ITEMS, NUM_HELD_OUT = 48_000, 200
CONTEXT = {"path": 128, "chain": 96, "graph": 160}
CONTEXT_OF_ONE_HOP = {"path": 32, "chain": 64, "graph": 96}
ROWS = 64
KINDS = {"llama": 0, "K1": 1, "K2": 2, "K4": 4}
"""Tokens per chunk; 0 for a model of tokens."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes, learning rates and numbers of optimizer steps for a task, tuned on other items.

    Args:
        layers: Decoder layers.
        theta: Base of the rotary position embeddings.
        muon: Peak learning rate of matrices.
        adamw: Peak learning rate of all other weights.
        first: Optimizer steps with all steps of an answer written.
        stage: Optimizer steps of each stage except the last.
        last: Optimizer steps of the last stage.
        one_hop: Optimizer steps on questions of a single hop, before everything else.
        all_pretrained: Whether every way starts from a model that writes its steps, and none from scratch.
        width: Hidden size.
        with_paths: Whether half of the questions of a single hop are from the task `path`.
    """

    layers: int
    theta: float
    muon: float
    adamw: float
    first: int
    stage: int
    last: int
    one_hop: int = 0
    all_pretrained: bool = True
    width: int = 64
    with_paths: bool = False

    def curriculum(self, stages: int) -> int:
        """Optimizer steps of all stages in which steps of the answer are left out."""
        return (stages - 1) * self.stage + self.last


LOOKUP = Setting(4, 10_000.0, 4e-3, 2e-3, first=700, stage=250, last=500, one_hop=1500)
"""If a fact spans several positions, two layers must cooperate to look it up. Models learn that first, from
questions of a single hop; on all questions at once, 3,000 steps were not enough."""
SETTINGS = {
    ("path", "K4"): Setting(2, 100.0, 2e-2, 5e-3, first=500, stage=200, last=400, all_pretrained=False),
    ("graph", "K4"): Setting(4, 100.0, 1e-2, 5e-3, first=4000, stage=250, last=750),
    ("chain", "K4"): Setting(2, 100.0, 1e-2, 5e-3, first=1500, stage=250, last=750, one_hop=1500, width=128),
}
"""For chunks of four tokens, where a fact is one position."""
SEARCH = dataclasses.replace(LOOKUP, first=2500, last=750)
"""The written steps of a search take longer to learn: 700 steps were too few, and for K = 2, 1,500 nearly."""
SETTINGS |= {("graph", kind): SEARCH for kind in ("llama", "K1", "K2")}
COMPUTATION = dataclasses.replace(LOOKUP, one_hop=2000, first=3500, last=750, with_paths=True)
"""From `chain` alone, look-ups were not learned in 3,000 steps; with questions of `path` mixed in, in 1,200:
there, the fact that is looked up is the answer, and nothing has to be computed from it. Written steps then
took 2,300."""
SETTINGS["chain", "llama"] = COMPUTATION
SETTINGS |= {("chain", kind): dataclasses.replace(COMPUTATION, one_hop=4000) for kind in ("K1", "K2")}
"""Chunks of two tokens learn the look-up between steps 1,800 and 2,100, if learning rates are still high."""
MARKER_STEPS = 300
"""Optimizer steps in which a model learns the markers of thoughts."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of training.

    Args:
        parent: The way whose weights it starts from; None for new ones.
        thoughts: Number of stages -> settings `thoughts` of the recipe.
        has_full_length: Whether it trains for as long as `steps` and the curriculum together.
        length_factor: Factor on the length of its stages.
    """

    parent: str | None
    thoughts: Callable[[int], dict[str, Any]]
    has_full_length: bool = False
    length_factor: int = 1


def supervised(mode: str, stages: int) -> dict[str, Any]:
    """Settings without written steps, where each thought or pause has a step as its label."""
    return {"mode": mode, "stages": stages, "first_stage": stages, "supervised": True}


WAYS = {
    "one_hop": Way(None, lambda stages: {"mode": "drop", "stages": 0}),
    "steps": Way(None, lambda stages: {"mode": "drop", "stages": 0}),
    "marked_steps": Way(None, lambda stages: {"mode": "state", "stages": 0}),
    "cot": Way("steps", lambda stages: {"mode": "drop", "stages": 0}),
    "no_cot": Way(None, lambda stages: {"mode": "drop", "stages": stages, "first_stage": stages}, True),
    "drop": Way("steps", lambda stages: {"mode": "drop", "stages": stages, "first_stage": 1}),
    "pause": Way("marked_steps", lambda stages: {"mode": "pause", "stages": stages, "first_stage": 1}),
    "thoughts": Way("marked_steps", lambda stages: {"mode": "state", "stages": stages, "first_stage": 1}),
    "at_once": Way(None, lambda stages: {"mode": "state", "stages": stages, "first_stage": stages}, True),
    "supervised": Way(None, lambda stages: supervised("state", stages), True),
    "supervised_pause": Way(None, lambda stages: supervised("pause", stages), True),
}
WAYS |= {
    f"{name}_longer": dataclasses.replace(WAYS[name], length_factor=3)
    for name in ("no_cot", "drop", "pause", "thoughts", "supervised", "supervised_pause")
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model to train.

    Args:
        task: A task of `calm tasks`.
        kind: A key of `KINDS`.
        way: A key of `WAYS`.
        seed: Seed of weights and training.
    """

    task: str
    kind: str
    way: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.task}_{self.kind}_{self.way}_{self.seed}"

    @property
    def setting(self) -> Setting:
        """How it is trained."""
        return SETTINGS.get((self.task, self.kind), LOOKUP)

    @property
    def before(self) -> "Cell | None":
        """The model whose weights it starts from; where look-ups are hard to learn, one that knows them."""
        way = WAYS[self.way].parent
        if self.setting.all_pretrained and way is None:
            is_marked = WAYS[self.way].thoughts(1)["mode"] != "drop"
            earlier = {"one_hop": None, "steps": "one_hop" if self.setting.one_hop else None}
            earlier["marked_steps"] = "steps"
            way = earlier.get(self.way, "marked_steps" if is_marked else "steps")
        return None if way is None else dataclasses.replace(self, way=way)


def train(cell: Cell, output: Path) -> Path:
    """Train a model, after the one that it starts from; finished models are kept."""
    folder = output / cell.name
    if (folder / "model/config.json").exists():
        return folder
    start = new_model(cell, output) if cell.before is None else train(cell.before, output) / "model"
    steps, setting = steps_of(cell), cell.setting
    is_short = cell.way == "one_hop"
    context = (CONTEXT_OF_ONE_HOP if is_short else CONTEXT)[cell.task]
    text = one_hop_text(cell) if is_short else cell.task
    recipe = FinetuningRecipe(
        seed=cell.seed + (100 if cell.before is not None else 0),  # Another order of questions.
        model=str(start),
        examples=ExampleSettings(
            sources=str(output / f"{text}.jsonl"),
            validation_sources=str(output / f"{cell.task}{'_one_hop' if is_short else ''}_held_out.jsonl"),
            context=context,
        ),
        thoughts=settings_of(cell),
        training=TrainingSettings(
            steps=steps,
            batch_tokens=ROWS * context,
            optimizer=OptimizerSettings(
                name="muon",
                learning_rate=setting.muon,
                adamw_learning_rate=setting.adamw,
                warmup_steps=50,
                schedule="warmup_stable_decay",
                decay_fraction=0.2,
            ),
            evaluate_every=0,
            save_every=1000,
            log_every=100,
        ),
        answers=AnswerSettings(number=0),
    )
    finetune(recipe, folder, resume=(folder / "recipe.yaml").exists())
    return folder


def steps_of(cell: Cell) -> int:
    """Optimizer steps of the model's own training."""
    setting, way = cell.setting, WAYS[cell.way]
    if cell.way == "one_hop":
        return setting.one_hop
    if cell.before is not None and cell.way == "marked_steps":
        return MARKER_STEPS
    curriculum = way.length_factor * setting.curriculum(max(HOPS[cell.task]))
    if cell.before is not None and cell.way != "steps":
        return curriculum
    return way.length_factor * setting.first + curriculum if way.has_full_length else setting.first


def settings_of(cell: Cell) -> ThoughtSettings:
    """Settings of thoughts: one per step, or if they are supervised, one per chunk of a step."""
    thoughts = WAYS[cell.way].thoughts(max(HOPS[cell.task]))
    return ThoughtSettings(
        per_step=4 // max(1, KINDS[cell.kind]) if thoughts.get("supervised") else 1,
        steps_per_stage=cell.setting.stage * WAYS[cell.way].length_factor,
        **thoughts,
    )


def new_model(cell: Cell, output: Path) -> Path:
    """A folder with an untrained model, which all ways share."""
    folder, chunk_size = output / f"new_{cell.task}_{cell.kind}_{cell.seed}", KINDS[cell.kind]
    if (folder / "config.json").exists():
        return folder
    setting = cell.setting
    tasks = (cell.task, "path") if setting.with_paths else (cell.task,)
    files = [(output / f"{task}.jsonl").read_text().splitlines()[:2000] for task in tasks]
    records = [json.loads(line) for file in files for line in file]
    tokenizer = train_tokenizer((" ".join([record["prompt"], *record["steps"]]) for record in records), 340)
    settings = LanguageModelSettings(
        hidden_size=setting.width,
        intermediate_size=2 * setting.width,
        num_layers=setting.layers,
        num_heads=4,
        max_chunks=512,
        rope_theta=setting.theta,
        head={"head_type": "sequential", "rank": 64},
    )
    recipe = Recipe(
        chunk_size=max(1, chunk_size),
        language_model=settings,
        autoencoder=AutoencoderSettings(kind="codes", latent_size=16 * max(1, chunk_size)),
    )
    set_seed(cell.seed)
    special = special_tokens_of(tokenizer)
    model: PreTrainedModel
    if chunk_size == 0:
        model = LlamaForCausalLM(autoregressive_config(recipe, len(tokenizer), special))
    else:
        autoencoder = CalmAutoencoder(autoencoder_config(recipe, len(tokenizer), special))
        model = CalmForCausalLM(language_model_config(recipe, autoencoder.config, special))
        model.autoencoder.load_state_dict(autoencoder.state_dict())
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(15)  # type: ignore[operator]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def one_hop_text(cell: Cell) -> str:
    """Name of the file with a model's questions of a single hop."""
    return f"{cell.task}_one_hop" + ("_with_paths" if cell.setting.with_paths else "")


def write_text(cell: Cell, output: Path) -> None:
    """Write the questions that a model is trained and tested on."""
    write_items(cell.task, output)
    file = output / f"{one_hop_text(cell)}.jsonl"
    if not file.exists():
        write_items("path", output)
        files = [output / f"{task}_one_hop.jsonl" for task in (cell.task, "path")]
        task_lines, path_lines = (part.read_text().splitlines()[: NUM_ITEMS // 2] for part in files)
        turns = itertools.chain.from_iterable(zip(task_lines, path_lines, strict=True))
        write_atomically(file, "".join(f"{line}\n" for line in turns))


def write_items(task: str, output: Path) -> None:
    """Write the questions of a task: one file with all numbers of hops in turns, one with single hops."""
    output.mkdir(parents=True, exist_ok=True)
    for name, all_hops in ((task, HOPS[task]), (f"{task}_one_hop", (1,))):
        for held_out, number in ((True, NUM_HELD_OUT), (False, NUM_ITEMS // len(all_hops))):
            file = output / f"{name}{'_held_out' if held_out else ''}.jsonl"
            if not file.exists():
                rows = zip(*(items(task, hops, 0, number, held_out) for hops in all_hops), strict=True)
                write_atomically(
                    file, "".join(json.dumps(item.record) + "\n" for row in rows for item in row)
                )
