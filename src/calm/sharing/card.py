"""What the model cards of all runs have in common: the format, and the facts about the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from calm.flops import Work, cost_of
from calm.hub.connection import is_hub_name
from calm.hub.gguf import as_hub_file
from calm.models.configuration import CalmConfig
from calm.models.language_model import language_model
from calm.models.shipped import shipped_models
from calm.quantities import short
from calm.storage.disk import expand_user
from calm.training.recipe_files import RECIPE

CARD = "README.md"
MARK = "<!-- Written by `calm share`; it is written anew each time. -->"
# Settings of recipes that may name local folders or files.
_PATH_SETTINGS = (
    "data.sources", "data.validation_sources", "data.tokenizer", "autoencoder.path",
    "language_model.init_from", "language_model.teacher.model",
    "model", "examples.sources", "examples.validation_sources", "examples.chat_template",
)  # fmt: skip


@dataclass(frozen=True)
class CardDetails:
    """What the person sharing a model says about it.

    Args:
        name: Name of the model.
        license_name: Identifier of its license, if given.
        about: A paragraph about the model, if given.
    """

    name: str
    license_name: str | None = None
    about: str | None = None


def card_of(
    run: Path,
    model: PreTrainedModel,
    details: CardDetails,
    sections: Mapping[str, str],
    results: list[EvalResult],
    *,
    prompt: str = "Once upon a time",
    tags: tuple[str, ...] = (),
    base_model: str | None = None,
) -> str:
    """A model card as Markdown.

    Args:
        run: Folder of the run.
        model: Its language model.
        details: Name, license, and a paragraph.
        sections: Title -> text.
        results: Evaluation results for the metadata.
        prompt: Prompt of the usage example.
        tags: Additional tags.
        base_model: Hub name of the base model.
    """
    is_calm = language_model(model).kind == "CALM"
    metadata = ModelCardData(
        library_name="calm-lm" if is_calm else "transformers",
        license=details.license_name,
        base_model=base_model,
        tags=[*(["calm", "continuous-autoregressive"] if is_calm else ["baseline"]), *tags],
        pipeline_tag="text-generation",
        model_name=details.name,
        eval_results=results,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n{MARK}",
        f"# {details.name}",
        _describe_model(model.config),
        *([details.about] if details.about else []),
        _usage_example(is_calm, details.name, prompt),
        *(f"## {title}\n\n{text}" for title, text in sections.items()),
        f"## Recipe\n\n```yaml\n{recipe_text(run / RECIPE)}```",
    ]
    return "\n\n".join(parts) + "\n"


def recipe_text(path: Path) -> str:
    """A recipe as YAML, without local folder names."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for setting in _PATH_SETTINGS:
        *groups, key = setting.split(".")
        group = recipe
        for name in groups:
            group = group.get(name, {})
        value = group.get(key)
        if isinstance(value, list):
            group[key] = [public_name(source) for source in value]
        elif isinstance(value, str):
            group[key] = public_name(value)
    return yaml.safe_dump(recipe, sort_keys=False)


def public_name(source: str) -> str:
    """A source as others may see it: the last component of a local path, or a hub name.

    A run's model is shown by the name of the run.
    """
    path = expand_user(source)
    if not path.exists() and (is_hub_name(source.partition(":")[0]) or as_hub_file(source) is not None):
        return source
    path = path.resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def repository_of(name: str) -> str | None:
    """The hub repository that a model name refers to; None if the model is local or not a hub name."""
    if Path(name).exists() or name in shipped_models():
        return None
    file = as_hub_file(name)
    repository = name if file is None else file.repository
    return repository if is_hub_name(repository) else None


def _describe_model(config: PreTrainedConfig) -> str:
    parameters = short(sum(cost_of(config).parameters.values()))
    if not isinstance(config, CalmConfig):
        return f"An autoregressive language model (Llama) of {parameters} parameters, a baseline for CALM."
    inference = sum(cost_of(config, Work(positions=512)).inference.values())
    head = f"a head of the kind `{config.head.head_type}`"
    if config.head.decodes_latents:
        design = (
            f"It predicts one latent of {config.latent_size} dimensions for each {config.chunk_size} tokens, "
            f"with {head}; its autoencoder is inside."
        )
    else:
        design = f"Each step of its backbone covers {config.chunk_size} tokens; {head} samples the next ones."
    return (
        "A continuous autoregressive language model ([CALM](https://arxiv.org/abs/2510.27688)) of "
        f"{parameters} parameters. {design} A token at T = 1, after 512 chunks, takes "
        f"{short(inference)} FLOPs."
    )


def _usage_example(is_calm: bool, name: str, prompt: str) -> str:
    sampling = "temperature=0.5, seed=1" if is_calm else "do_sample=True"
    folder = name if "/" in name else f"path/to/{name}"  # Hub names have an owner.
    import_line = "import calm  # of the package calm-lm; no remote code\n" if is_calm else ""
    limits = (
        "\nTemperatures lie between 0 and 1. The model has no logits of tokens, and so no beam search."
        if is_calm
        else ""
    )
    return (
        f"```python\n{import_line}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'prompt = tokenizer({json.dumps(prompt, ensure_ascii=False)}, return_tensors="pt")\n'
        f"tokens = model.generate(**prompt, max_new_tokens=100, {sampling})\n"
        f"print(tokenizer.decode(tokens[0], skip_special_tokens=True))\n```{limits}"
    )
