"""Commands that list recipes and models. They answer at once: neither torch nor transformers is imported."""

import json as json_format
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_PAPER_PREFIXES = ("calm_", "transformer_")


def recipes(json: bool = False) -> None:
    """List the shipped recipes: what each is for, how large its model is, and what it needs.

    Args:
        json: Print one JSON object: command -> name -> description.
    """
    from calm.training.finetuning_recipe import FinetuningRecipe
    from calm.training.recipe import Recipe
    from calm.training.recipe_settings import about_recipe, shipped_recipes

    listed = {
        command: {name: about_recipe(path) for name, path in sorted(shipped_recipes(kind).items(), key=_rank)}
        for command, kind in (("train", Recipe), ("finetune", FinetuningRecipe))
    }
    if json:
        print(json_format.dumps(listed, indent=1))
        return
    for command, about in listed.items():
        _print_list(f"calm {command} --recipe NAME", ["name", "about"], [[*pair] for pair in about.items()])


def _rank(recipe: tuple[str, Path]) -> tuple[bool, str]:
    """Sort key: the recipes of the paper, which need many GPUs, come last."""
    return recipe[0].startswith(_PAPER_PREFIXES), recipe[0]


def models(folder: str = ".", json: bool = False) -> None:
    """List the shipped models, and those in a folder.

    Args:
        folder: Folder to search, three levels deep.
        json: Print one JSON object: name or folder -> type, head and K.
    """
    from calm.models.missing import models_in
    from calm.models.shipped import shipped_models

    listed = {name: _about_model(path) for name, path in shipped_models().items()}
    listed |= {path.as_posix(): _about_model(path) for path in models_in(Path(folder))}
    if json:
        print(json_format.dumps(listed, indent=1))
        return
    rows = [
        [name, about["type"], about["head"] or "", str(about["K"] or "")] for name, about in listed.items()
    ]
    _print_list("calm generate MODEL PROMPT", ["model", "type", "head", "K"], rows)


def _about_model(folder: Path) -> dict[str, Any]:
    """Type, head and K from the configuration of a language model; None for what it lacks."""
    from calm.models.missing import settings_of_model

    config = settings_of_model(folder)
    parts = [config.get(part) for part in ("head_config", "autoencoder_config")]
    head, autoencoder = (part if isinstance(part, dict) else {} for part in parts)
    return {
        "type": config.get("model_type") or f"adapters of {config.get('base_model_name_or_path')}",
        "head": head.get("head_type"),
        "K": autoencoder.get("chunk_size"),
    }


def _print_list(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)
