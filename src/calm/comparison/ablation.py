"""One question about the method: a recipe trained with each of several settings, and scored."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse

from calm.comparison.costs import autoencoder_flops, language_model_flops, pretrained_parts
from calm.comparison.text import with_shared_text
from calm.data.prepared import load_prepared
from calm.errors import InputError
from calm.evaluation.held_out import score_model
from calm.flops import cost_of
from calm.models.loading import load_model_and_tokenizer
from calm.progress import announce, track
from calm.report.facts import here_and_now
from calm.report.measured import NATS, AblationTable, Outcome
from calm.storage.checksums import CHECKSUMS, matches_checksum, write_file_checksum
from calm.storage.disk import read_json, write_atomically
from calm.training.blocks import block_settings
from calm.training.build import model_config
from calm.training.check import check_model
from calm.training.clock import seconds_of
from calm.training.continuing import with_inherited_parts
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, recipe_text, with_settings
from calm.training.recipe_settings import EXTENDS
from calm.training.runs import HISTORY
from calm.training.stages import train, train_autoencoder

SCORES = "scores.json"
_PARTS = ("chunk_size", "autoencoder", "language_model")  # The parts of a recipe that a choice may change.


@dataclasses.dataclass(kw_only=True)
class Choice:
    """One of the settings that are compared.

    Args:
        name: Its name in the table, from which the folder of its runs is derived.
        settings: Dotted names of recipe fields and their values.
        published: BrierLM in the paper, if reported there.
    """

    name: str
    settings: dict[str, Any]
    published: float | None = None

    @property
    def folder(self) -> str:
        """The name as a folder name: M = 16 becomes M_16."""
        return "_".join("".join(c if c.isalnum() or c in ".-" else " " for c in self.name).split())


@dataclasses.dataclass(kw_only=True)
class Ablation:
    """A question and the settings that answer it.

    Args:
        question: The question to answer.
        choices: The settings to compare.
    """

    question: str
    choices: list[Choice]


def shipped_ablations() -> dict[str, Path]:
    """Name -> file of the ablations in the package."""
    folder = Path(str(resources.files("calm") / "ablations"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_ablation(name: str) -> Ablation:
    """Read an ablation by the name of a shipped one or by path.

    Raises:
        InputError: If there is none, or it is invalid.
    """
    shipped = shipped_ablations()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise InputError(f"there is no ablation '{name}'; give a .yaml file or one of: {', '.join(shipped)}.")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Ablation)
    try:
        ablation = Ablation(**vars(parser.instantiate(parser.parse_path(str(path)))))
    except jsonargparse.ArgumentError as error:
        if EXTENDS in str(error):
            raise InputError(
                f"ablation '{name}': only recipes can use '{EXTENDS}'; remove it, and pass the recipe that "
                "all runs share, which may extend another, with --recipe."
            ) from error
        raise InputError(f"ablation '{name}': {error}") from error
    for setting in (setting for choice in ablation.choices for setting in choice.settings):
        if setting.split(".")[0] not in _PARTS or setting == "autoencoder.path":
            raise InputError(
                f"ablation '{name}': a choice cannot set '{setting}', which all runs share; remove it."
            )
    folders = [choice.folder for choice in ablation.choices]
    if not folders or "" in folders or len(set(folders)) < len(folders):
        raise InputError(f"ablation '{name}': its choices need names that differ in letters or digits.")
    return ablation


def run_ablation(
    ablation: Ablation,
    recipe: Recipe,
    seeds: Sequence[int],
    output: Path,
    *,
    only: Sequence[str] = (),
    num_blocks: int | None = None,
) -> AblationTable:
    """Train the missing runs, score all on the same held-out text, and collect the results in a table.

    Every choice is trained with every seed for the recipe's number of steps. Choices whose autoencoders have
    the same settings share one per seed. Finished runs are kept, and interrupted ones are resumed.

    Args:
        ablation: The settings to compare.
        recipe: The recipe that all runs share; without sources, it is trained on the embedded stories.
        seeds: Seeds of the runs. All use the same text and held-out split.
        output: Folder of all runs.
        only: Names of the choices to train; all by default.
        num_blocks: Number of held-out blocks to score; all if None.

    Raises:
        InputError: If a choice does not fit the recipe.
    """
    chosen = [choice for choice in ablation.choices if not only or choice.name in only]
    if not seeds or not chosen or len(chosen) < len(only):
        names = ", ".join(choice.name for choice in ablation.choices)
        raise InputError(f"an ablation needs at least one seed, and choices from: {names}.")
    if recipe.model != "calm" or recipe.autoencoder.path is not None:
        raise InputError("an ablation needs a recipe for a CALM that trains its own autoencoder.")
    for choice, seed in itertools.product(chosen, seeds):
        check_model(_recipe_of(choice, recipe, seed))
    output = output.resolve()
    recipe = with_shared_text(with_inherited_parts(recipe), output)
    vocab_size = load_prepared(Path(recipe.data.source_list[0])).vocab_size
    outcomes = []
    for choice in chosen:
        variant = with_inherited_parts(_recipe_of(choice, recipe, seeds[0]))
        flops = autoencoder_flops(variant, vocab_size) + language_model_flops(variant, vocab_size)
        outcomes.append(
            Outcome(
                name=choice.name,
                published=choice.published,
                training_flops=flops,
                parameters=sum(cost_of(model_config(variant, vocab_size)).parameters.values()),
                excluded=pretrained_parts(variant),
            )
        )
    runs = list(itertools.product(seeds, zip(chosen, outcomes, strict=True)))
    for seed, (choice, outcome) in track(runs, "ablation", "run", stays=True):
        announce(f"training {choice.name}, seed {seed}")
        variant, run = _recipe_of(choice, recipe, seed), output / choice.folder / f"seed{seed}"
        timed_runs = [run]
        if variant.language_model.init_from is None or variant.language_model.new_head:
            # With the language model of the base recipe, so that choices can share this run.
            shared = dataclasses.replace(variant, language_model=recipe.language_model)
            autoencoder = _train_shared_autoencoder(shared, output)
            variant = with_settings(variant, {"autoencoder.path": str(autoencoder)})
            timed_runs += [autoencoder.parent] if shared.trains_autoencoder else []
        train(variant, run, resume=(run / RECIPE).is_file())
        outcome.scores.append(_score(run, variant, num_blocks))
        outcome.seconds.append(_seconds(timed_runs))
    return AblationTable(
        question=ablation.question,
        seeds=list(seeds),
        context=recipe.data.context,
        layout=recipe.data.layout,
        outcomes=outcomes,
        recipe=recipe_text(recipe),
        provenance=here_and_now(),
    )


def _recipe_of(choice: Choice, recipe: Recipe, seed: int) -> Recipe:
    return with_settings(recipe, {**choice.settings, "seed": seed})


def _train_shared_autoencoder(recipe: Recipe, output: Path) -> Path:
    """Train the autoencoder of a recipe, shared by all runs with the same settings and seed."""
    settings = {"chunk_size": recipe.chunk_size, **dataclasses.asdict(recipe.autoencoder)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    run = output / f"autoencoder-{digest}" / f"seed{recipe.seed}"
    return train_autoencoder(recipe, run, resume=(run / RECIPE).is_file())


def _seconds(runs: Sequence[Path]) -> float | None:
    """Time of all stages of several runs; None if any is unknown: no score depends on it."""
    try:
        return seconds_of([log for run in runs for log in read_json(run / HISTORY, dict).values()])
    except (FileNotFoundError, InputError):
        return None


def _score(run: Path, recipe: Recipe, num_blocks: int | None) -> dict[str, float]:
    """Held-out scores of a run, cached in its folder for as long as it has the same model.

    A run that is extended by more steps gets another model.
    """
    path, checksums = run / SCORES, run / "model" / CHECKSUMS
    measured_with = {
        **dataclasses.asdict(block_settings(recipe)),
        "num_blocks": num_blocks,
        "model": hashlib.sha256(checksums.read_bytes()).hexdigest() if checksums.is_file() else None,
    }
    if measured_with["model"] is not None and matches_checksum(path):
        cached = read_json(path, dict)
        if cached["how"] == measured_with:
            figures: dict[str, float] = cached["figures"]
            return figures
    model, _ = load_model_and_tokenizer(str(run / "model"))
    data = load_prepared(Path(recipe.data.source_list[0]))
    card = score_model(model, data, block_settings(recipe), num_blocks=num_blocks)
    assert card.reconstruction is not None
    figures = {
        **card.brier.as_metrics(),
        "error": card.brier.brier_lm_error,
        "token_accuracy": card.reconstruction.as_metrics()["token_accuracy"],
    }
    if card.perplexity is not None:
        figures[NATS] = card.perplexity.cross_entropy
    write_atomically(path, json.dumps({"how": measured_with, "figures": figures}, indent=1) + "\n")
    write_file_checksum(path)
    return figures
