"""A run -> a model folder that others can use: a model card written from the run, and the way to the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from calm.comparison.costs import record_of
from calm.data.folders import write_file_whole, written_whole
from calm.data.prepare import load_prepared
from calm.errors import InputError, RunError, reason_of
from calm.evaluation.held_out import Scorecard, score_model
from calm.flops import Work, cost_of
from calm.hub import is_hub_name, unreachable
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmConfig
from calm.models.loading import load_language_model_and_tokenizer
from calm.report.tables import BRIER_COLUMNS, cells_of, rows_of, short
from calm.training.recipe import Recipe
from calm.training.recipe_files import RECIPE, read_recipe
from calm.training.stages import data_folder

CARD = "README.md"
_MARK = "<!-- Written by `calm share`; it is written anew each time. -->"


def write_card(
    run: Path,
    *,
    name: str | None = None,
    license_name: str | None = None,
    about: str | None = None,
    ngrams: list[int] | None = None,
    num_blocks: int | None = None,
) -> Path:
    """Score a finished run on its held-out text and write the model card into its model folder.

    Args:
        run: Folder of `calm train`.
        name: Of the model on the card; that of the run's folder if none is given.
        license_name: An identifier that the hub knows, such as "mit".
        about: A paragraph in your own words.
        ngrams: Orders of n-gram floors on the card.
        num_blocks: Held-out blocks that are scored at most.

    Returns:
        The card.

    Raises:
        InputError: If the run is not finished, or there is a card of somebody's own.
    """
    folder = run / "model"
    if not (run / RECIPE).is_file() or not folder.is_dir():
        raise InputError(f"'{run}' is no finished run of `calm train` (it needs {RECIPE} and model/).")
    path = folder / CARD
    if path.is_file() and _MARK not in path.read_text(encoding="utf-8"):
        raise InputError(f"'{path}' was not written by `calm share`; move it away to have one written.")
    recipe = read_recipe(str(run / RECIPE))
    model, _ = load_language_model_and_tokenizer(str(folder))
    data = load_prepared(data_folder(recipe, run))
    card = score_model(
        model, data, context=recipe.data.context, ngrams=ngrams or [], num_blocks=num_blocks,
        layout_seed=recipe.seed,
    )  # fmt: skip
    name = name or run.resolve().name
    write_file_whole(path, card_text(run, recipe, model, card, name, license_name, about))
    return path


def export(folder: Path, target: Path, dtype: str) -> None:
    """Copy a model folder with its card, the weights in another type.

    The copy is loaded in float32 all the same: the type is that of the file, not of the computation.

    Args:
        folder: The model folder.
        target: Folder to write.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        InputError: If there is something at the target, or the type is not one of these.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be float32, bfloat16 or float16, got '{dtype}'.")
    if target.exists():
        raise InputError(f"'{target}' is there already; choose another --export or move it away.")
    model, tokenizer = load_language_model_and_tokenizer(str(folder))
    with written_whole(target) as partial:
        torch.nn.Module.to(model, getattr(torch, dtype))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        write_file_whole(partial / "config.json", json.dumps(_in_float32(config), indent=2) + "\n")
        shutil.copyfile(folder / CARD, partial / CARD)
        write_file_whole(partial / RECIPE, _recipe(folder / RECIPE))


def _in_float32(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those in it, that asks for float32 and names no folder of this machine."""
    nested = {
        name: _in_float32(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != "_name_or_path"
    }
    return nested | ({"dtype": "float32"} if "dtype" in config else {})


def check_push(repository: str) -> None:
    """Find out before the work whether a model could be uploaded.

    Args:
        repository: "owner/name".

    Raises:
        InputError: If it is no such name.
        RunError: If the hub cannot be reached.
    """
    if "/" not in repository or not is_hub_name(repository):
        raise InputError(f"'{repository}' is no name on the hub; give OWNER/NAME.")
    if (reason := unreachable()) is not None:
        raise RunError(f"'{repository}' could not be uploaded ({reason}); try again with a network.")


def push(folder: Path, repository: str, *, is_private: bool) -> str:
    """Upload a model folder to the hub.

    Args:
        folder: The model folder, with its card.
        repository: "owner/name"; it is made if there is none.
        is_private: Whether a new repository is private.

    Returns:
        The address of the model.

    Raises:
        InputError: If it is no such name.
        RunError: If the hub cannot be reached or refuses.
    """
    check_push(repository)
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=is_private, exist_ok=True)
        message = "A model of calm"
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=[RECIPE]
        )
        recipe = _recipe(folder / RECIPE).encode()
        hub.upload_file(
            path_or_fileobj=recipe, path_in_repo=RECIPE, repo_id=repository, commit_message=message
        )
    except Exception as error:  # Of the network, the hub, or the name.
        raise RunError(
            f"'{repository}' could not be uploaded ({reason_of(error)}); "
            "log in with `hf auth login`, and the same command goes on."
        ) from error
    return str(address)


def card_text(
    run: Path,
    recipe: Recipe,
    model: PreTrainedModel,
    card: Scorecard,
    name: str,
    license_name: str | None,
    about: str | None = None,
) -> str:
    """The model card as Markdown.

    Args:
        run: Folder of the run.
        recipe: Its recipe.
        model: Its language model.
        card: Its figures on held-out text.
        name: Of the model.
        license_name: Its licence, if one was named.
        about: A paragraph of its makers.
    """
    config = model.config
    kind = "calm" if isinstance(model, CalmForCausalLM) else "autoregressive"
    sources = [_shown(source) for source in recipe.data.source_list]
    metric = "brier_1" if card.brier.undefined else "brier_lm"
    metadata = ModelCardData(
        library_name="calm-lm" if kind == "calm" else "transformers",
        license=license_name,
        tags=["calm", "continuous-autoregressive"] if kind == "calm" else ["baseline"],
        pipeline_tag="text-generation",
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out text",
                dataset_name=", ".join(sources),
                metric_type=metric,
                metric_name={"brier_lm": "BrierLM", "brier_1": "Brier-1"}[metric],
                metric_value=round(card.brier.as_metrics()[metric], 3),
            )
        ],
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n{_MARK}",
        f"# {name}",
        _what_it_is(config),
        *([about] if about else []),
        _how_to_use(kind, name),
        f"## Data\n\n{_data(run, recipe, sources)}",
        f"## Training\n\n{_training(run, recipe, config)}",
        f"## Evaluation\n\n{_evaluation(card, recipe)}",
        f"## Recipe\n\n```yaml\n{_recipe(run / RECIPE)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _what_it_is(config: PreTrainedConfig) -> str:
    parameters = short(sum(cost_of(config).parameters.values()))
    if not isinstance(config, CalmConfig):
        return f"An autoregressive language model (Llama) of {parameters} parameters, a baseline for CALM."
    inference = sum(cost_of(config, Work(positions=512)).inference.values())
    return (
        "A continuous autoregressive language model ([CALM](https://arxiv.org/abs/2510.27688)) of "
        f"{parameters} parameters. It predicts one latent of {config.latent_size} dimensions for each "
        f"{config.chunk_size} tokens, with a head of the kind `{config.head.head_type}`; its autoencoder is "
        f"inside. A token at T = 1, behind 512 chunks, takes {short(inference)} operations."
    )


def _how_to_use(kind: str, name: str) -> str:
    sampling = "temperature=0.5, seed=1" if kind == "calm" else "do_sample=True"
    folder = name if "/" in name else f"path/to/{name}"  # A name on the hub has an owner.
    begin = "import calm  # pip install calm-lm; no remote code\n" if kind == "calm" else ""
    limits = (
        "\nTemperatures lie between 0 and 1. The model has no logits of tokens, and so no beam search."
        if kind == "calm"
        else ""
    )
    return (
        f"```python\n{begin}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        'prompt = tokenizer("Once upon a time", return_tensors="pt")\n'
        f"tokens = model.generate(**prompt, max_new_tokens=100, {sampling})\n"
        f"print(tokenizer.decode(tokens[0], skip_special_tokens=True))\n```{limits}"
    )


def _data(run: Path, recipe: Recipe, sources: list[str]) -> str:
    counts = load_prepared(data_folder(recipe, run)).counts()
    of_sample = "Text was streamed; of a sample of it there were " if recipe.data.streaming else ""
    held_out = recipe.data.validation_source_list
    how = f"from {', '.join(map(_shown, held_out))}" if held_out else "equal documents together"
    return f"{', '.join(sources)}. {of_sample}{counts}, {how}."


def _training(run: Path, recipe: Recipe, config: PreTrainedConfig) -> str:
    settings, lines = recipe.language_model.training, []
    if recipe.trains_autoencoder:
        first = recipe.autoencoder.training
        lines.append(f"Autoencoder: {first.steps:,} steps of {first.batch_tokens:,} tokens.")
    lines.append(
        f"Language model: {settings.steps:,} steps of {settings.batch_tokens:,} tokens, in blocks of "
        f"{recipe.data.context}, with {settings.optimizer.name}."
    )
    if (record := record_of(run, config)) is not None:
        is_long = record.seconds >= 60
        time = f"{record.seconds / 60:.0f} minutes" if is_long else f"{record.seconds:.0f} s"
        lines.append(
            f"Together {record.flops:.2e} operations by count; {time}, held-out evaluations included "
            "(since the last resume, where a run was stopped)."
        )
    return "\n".join(lines)


def _evaluation(card: Scorecard, recipe: Recipe) -> str:
    rows = [f"| | {' | '.join(BRIER_COLUMNS)} |", "|---" * (len(BRIER_COLUMNS) + 1) + "|"]
    for name, result in rows_of(card):
        cells = " | ".join(cell.replace("±", " ± ") for cell in cells_of(result))
        rows.append(f"| {name} | {cells} |")
    protocol = (
        f"Held-out text, T = 1, {card.brier.num_chunks:,} chunks in blocks of {card.brier.context} tokens "
        "(layout documents), percent ± standard error over documents, training seed "
        f"{recipe.seed}. Scores of other contexts or tokenizers do not compare."
    )
    more = ""
    if card.reconstruction is not None:
        more = f"\n\nThe autoencoder gives back {card.reconstruction.token_accuracy:.2%} of held-out tokens."
    if card.perplexity is not None:
        more += f"\n\nPerplexity {card.perplexity.perplexity:.3f} a token."
    return "\n".join(rows) + f"\n\n{protocol}{more}"


def _recipe(path: Path) -> str:
    """The recipe without the folders of whoever trained."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for place, name in (
        (values["data"], "sources"), (values["data"], "validation_sources"), (values["data"], "tokenizer"),
        (values["autoencoder"], "path"),
    ):  # fmt: skip
        value = place.get(name)
        if isinstance(value, list):
            place[name] = [_shown(one) for one in value]
        elif isinstance(value, str):
            place[name] = _shown(value)
    return yaml.safe_dump(values, sort_keys=False)


def _shown(source: str) -> str:
    """A source as others may read it: the last part of a path here, or a name on the hub."""
    path = Path(source)
    return path.resolve().name if path.exists() or path.is_absolute() else source
