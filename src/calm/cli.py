"""The command line: thin verbs, each a typed function whose docstring is its help.

Imports of torch and transformers happen inside the verbs, so that `calm --help` answers at once.
"""

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import docstring_parser
import jsonargparse

import calm
from calm.errors import InputError
from calm.training.recipe import (
    AutoencoderSettings,
    DataSettings,
    LanguageModelSettings,
    OptimizerSettings,
    Recipe,
    TrainingSettings,
)

RECIPE_PARTS = (
    Recipe,
    DataSettings,
    AutoencoderSettings,
    LanguageModelSettings,
    TrainingSettings,
    OptimizerSettings,
)


def demo(output: str = "runs/demo", overwrite: bool = False, recipe: str = "demo") -> None:
    """Train on the embedded stories, score the model, and let it write.

    Args:
        output: Folder of the run.
        overwrite: Remove what is in that folder first.
        recipe: Recipe to follow.
    """
    from calm.demo import run_demo

    run_demo(Path(output), recipe_name=recipe, overwrite=overwrite)


def prepare(
    sources: list[str],
    output: str,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    text_field: str = "text",
    separator: str | None = None,
    validation: list[str] | str | None = None,
    validation_fraction: float = 0.02,
    seed: int = 0,
    num_proc: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn text into a prepared folder: tokenizer, tokenized training and held-out documents.

    Args:
        sources: Files (.txt, .jsonl, .parquet; plain, .gz, .xz, .zst, .bz2), folders, or hub datasets.
        output: Folder to write.
        tokenizer: Folder, tokenizer.json or hub name; none trains a byte-level BPE on the text.
        vocab_size: Size of a trained vocabulary.
        text_field: Field of the text in .jsonl, .parquet and hub datasets.
        separator: Line that parts the documents of a .txt file ("" for a blank line).
        validation: Sources of held-out text; none holds out a part of the sources.
        validation_fraction: Share of documents held out.
        seed: Changes which documents are held out.
        num_proc: Processes; none takes all cores.
        overwrite: Replace the output folder.
    """
    from calm.data.prepare import prepare as run
    from calm.data.sources import ReadingOptions

    data = run(
        sources,
        Path(output),
        options=ReadingOptions(text_field=text_field, separator=separator),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_sources=[validation] if isinstance(validation, str) else validation or [],
        validation_fraction=validation_fraction,
        seed=seed,
        num_proc=num_proc,
        overwrite=overwrite,
    )
    print(
        f"{output}: {len(data.train)} training and {len(data.validation)} held-out documents, "
        f"{data.vocab_size} token ids"
    )


def train(recipe: Recipe, output: str, resume: bool = False, overwrite: bool = False) -> None:
    """Follow a recipe: prepare the text, train the autoencoder, then the language model.

    Args:
        recipe: The recipe.
        output: Folder of the run.
        resume: Go on with the run in that folder.
        overwrite: Remove what is in that folder first.
    """
    from calm.training.stages import train as run

    print(f"model: {run(recipe, Path(output), resume=resume, overwrite=overwrite)}")


def evaluate(
    model: str,
    data: list[str],
    context: int = 1024,
    layout: Literal["documents", "packed"] = "documents",
    max_blocks: int | None = None,
    ngrams: list[int] | int | None = None,
    num_draws: int = 2,
    estimator: Literal["best", "draws"] = "best",
    protocol: Literal["published"] | None = None,
    text_field: str = "text",
    separator: str | None = None,
    seed: int = 1234,
) -> None:
    """Score a model on held-out text: BrierLM, Brier-1 to Brier-4, reconstruction or perplexity.

    Args:
        model: Folder or hub name of a CALM or of any causal language model of transformers.
        data: A prepared folder (its held-out part is scored), or sources that are scored whole.
        context: Tokens per block; part of the protocol, scores of other contexts do not compare.
        layout: "documents", or "packed" as in the published evaluation.
        max_blocks: Score this many blocks at most.
        ngrams: Orders of n-gram floors to print beside, such as [3,5] (needs a prepared folder).
        num_draws: Draws of each chunk, at least 2; more give smaller errors.
        estimator: best uses probabilities where a model has them; draws scores it as a CALM is scored.
        protocol: published is the paper's: packed documents, blocks of 8192 tokens.
        text_field: Field of the text in .jsonl, .parquet and hub datasets.
        separator: Line that parts the documents of a .txt file ("" for a blank line).
        seed: Seed of the draws.
    """
    from calm.data.prepare import held_out_data
    from calm.data.sources import ReadingOptions
    from calm.evaluation.held_out import score_model
    from calm.models.loading import load_language_model_and_tokenizer
    from calm.report import print_scorecard

    context, layout = PROTOCOLS[protocol] if protocol else (context, layout)
    network, tokenizer = load_language_model_and_tokenizer(model)
    options = ReadingOptions(text_field=text_field, separator=separator)
    print_scorecard(
        score_model(
            network,
            held_out_data(data, tokenizer, options),
            context=context,
            layout=layout,
            ngrams=[ngrams] if isinstance(ngrams, int) else ngrams,
            num_blocks=max_blocks,
            seed=seed,
            num_draws=num_draws,
            estimator=estimator,
        )
    )


def generate(
    model: str,
    prompt: list[str],
    max_new_tokens: int = 128,
    temperature: float = 0.5,
    sampler: Literal["exact", "pool"] = "exact",
    num_draws: int = 200,
    max_draws: int = 200,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stream: bool = False,
) -> None:
    """Continue prompts.

    Args:
        model: Model folder, or name on the hub.
        prompt: Text to continue; more than one are written as a batch.
        max_new_tokens: Most tokens of a continuation.
        temperature: From 0 to 1; lower is more fluent and less varied, 0 the commonest chunk of a pool.
        sampler: exact follows the tempered law wherever max_draws suffice; pool approximates it.
        num_draws: Pool of draws of the pool sampler, and of both at temperature 0.
        max_draws: Most draws a chunk of the exact sampler.
        top_p: Pool only: keep the commonest chunks that make up this share of the pool.
        min_p: Pool only: drop chunks less frequent than this share of the commonest.
        seed: Makes the text repeatable.
        stream: Print the text as it is written.
    """
    from calm.generation import continue_texts
    from calm.models.loading import load_model_and_tokenizer

    if stream and len(prompt) > 1:
        raise InputError("--stream takes one prompt at a time.")
    network, tokenizer = load_model_and_tokenizer(model)
    if stream:
        print(prompt[0], end="", flush=True)
    texts = continue_texts(
        network,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        sampler=sampler,
        num_draws=num_draws,
        max_draws=max_draws,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stream=stream,
    )
    if not stream:
        print("\n\n".join(start + text for start, text in zip(prompt, texts, strict=True)))


def import_published(
    autoencoder: str, model: str, out: str, tokenizer: str | None = None, overwrite: bool = False
) -> None:
    """Turn a released checkpoint into a model folder.

    Args:
        autoencoder: Folder of the released autoencoder.
        model: Folder of the released language model.
        out: Folder to write.
        tokenizer: Folder, tokenizer.json or hub name of its tokenizer, to put inside.
        overwrite: Replace the output folder.
    """
    from calm.data.folders import written_whole
    from calm.data.tokenizer import load_tokenizer
    from calm.models.published import load_published

    with written_whole(Path(out), overwrite) as folder:
        network = load_published(Path(autoencoder), Path(model))
        if tokenizer is not None:
            tokens = load_tokenizer(tokenizer)
            if len(tokens) > network.config.vocab_size:
                raise InputError(
                    f"the tokenizer '{tokenizer}' has {len(tokens)} tokens, more than the model's "
                    f"{network.config.vocab_size}; give the tokenizer that the model was trained with."
                )
            tokens.save_pretrained(folder)
        network.save_pretrained(folder)
    parameters = sum(p.numel() for p in network.parameters())
    head, size = network.config.head.head_type, network.config.chunk_size
    print(f"{out}: {head} head, K = {size}, {parameters:,} parameters")


def doctor() -> None:
    """Tell which hardware, dtype and attention would be used here, and why."""
    from calm.doctor import examine

    for line in examine():
        print(line)


VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "import": import_published,
    "doctor": doctor,
}
PROTOCOLS: dict[str, tuple[int, Literal["documents", "packed"]]] = {"published": (8192, "packed")}
_POSITIONAL = ("model", "sources", "data", "prompt")


class _Parser(jsonargparse.ArgumentParser):
    """Reports a mistake as one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(self._sentence(str(ex) if ex is not None else message))

    def _sentence(self, message: str) -> str:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        sentence = re.sub(r"required: \w+\.(\w+)", r"required: --\1", " ".join(lines))
        unknown = re.search(r"option '([\w.]+)'|arguments?: --([\w.-]+)", sentence)
        if unknown:
            name = (unknown[1] or unknown[2]).split(".")[-1]
            near = difflib.get_close_matches(name, self._known_names(), n=1)
            sentence += f"; did you mean '{near[0]}'?" if near else ""
        return sentence

    def _known_names(self) -> list[str]:
        return sorted({field.name for settings in RECIPE_PARTS for field in dataclasses.fields(settings)})


def fail(message: str) -> NoReturn:
    """Print a mistake of the user and leave with exit code 2."""
    print(f"calm: error: {message}", file=sys.stderr)
    sys.exit(2)


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(prog="calm", description="Continuous autoregressive language models.")
    parser.add_argument("--version", action="version", version=f"calm {calm.__version__}")
    verbs = parser.add_subcommands(dest="verb")
    for name, function in VERBS.items():
        verb = _Parser(description=_summary(function))
        if function is train:
            verb.add_argument(
                "--recipe", action="config", help="shipped name or .yaml file; later options win"
            )
            verb.add_class_arguments(Recipe, sub_configs=False)
        _add_parameters(verb, function)
        verbs.add_subcommand(name, verb, help=_summary(function))
    return parser


def _add_parameters(parser: jsonargparse.ArgumentParser, function: Callable[..., None]) -> None:
    """Arguments of a verb: the chief ones by position, flags without a value, the rest as options."""
    documented = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__ or "").params}
    by_hand: set[str | int] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.annotation is Recipe:
            by_hand.add(name)
        elif parameter.annotation is bool:
            parser.add_argument(f"--{name}", action="store_true", help=documented[name])
            by_hand.add(name)
        elif name in _POSITIONAL and function is not import_published:
            several: dict[str, Any] = {"nargs": "+"} if parameter.annotation == list[str] else {}
            parser.add_argument(name, type=str, help=documented[name], **several)
            by_hand.add(name)
    parser.add_function_arguments(function, skip=by_hand, as_positional=False)


def _summary(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def main(arguments: list[str] | None = None) -> None:
    """Run a verb; a mistake of the user ends in one sentence and exit code 2."""
    arguments = _with_recipe_paths(list(sys.argv[1:] if arguments is None else arguments))
    try:
        parser = build_parser()
        values = parser.instantiate(parser.parse_args(arguments))
        if values.verb is None:
            parser.print_help()
            return
        settings = dict(vars(values[values.verb]))
        if values.verb == "train":
            settings.pop("recipe", None)
            fields = {field.name: settings.pop(field.name) for field in dataclasses.fields(Recipe)}
            settings["recipe"] = Recipe(**fields)
        _quieten()
        VERBS[values.verb](**settings)
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("calm: interrupted", file=sys.stderr)
        sys.exit(130)


def _quieten() -> None:
    """Keep the bars of training and tokenizing, not those of every file that is read or written."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _with_recipe_paths(arguments: list[str]) -> list[str]:
    """Replace the names of shipped recipes behind --recipe by their paths."""
    from calm.training.recipe_files import find_recipe

    result = list(arguments)
    try:
        for i, argument in enumerate(arguments):
            if argument.startswith("--recipe="):
                result[i] = "--recipe=" + find_recipe(argument.removeprefix("--recipe="))
            elif argument == "--recipe" and i + 1 < len(arguments) and arguments[0] == "train":
                result[i + 1] = find_recipe(arguments[i + 1])
    except InputError as error:
        fail(str(error))
    return result
