"""The command line: the arguments of the verbs (calm.verbs), and mistakes as one sentence."""

import dataclasses
import difflib
import inspect
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import docstring_parser
import jsonargparse

import calm
from calm.errors import InputError, RunError, Terminated
from calm.training.finetuning_recipe import (
    AnswerSettings,
    ExampleSettings,
    FinetuningRecipe,
    LoraSettings,
)
from calm.training.recipe import (
    AutoencoderSettings,
    DataSettings,
    LanguageModelSettings,
    OptimizerSettings,
    Recipe,
    TrainingSettings,
)
from calm.verbs import VERBS

RECIPE_PARTS = (
    Recipe,
    DataSettings,
    AutoencoderSettings,
    LanguageModelSettings,
    TrainingSettings,
    OptimizerSettings,
    FinetuningRecipe,
    ExampleSettings,
    LoraSettings,
    AnswerSettings,
)
# Verbs that follow a recipe, whose fields are their options.
_RECIPES: dict[str, type] = {"train": Recipe, "finetune": FinetuningRecipe}
_POSITIONAL = ("model", "sources", "data", "prompt", "target", "runs", "run", "question")
_NOT_POSITIONAL = ((VERBS["import"], "model"), (VERBS["compare"], "data"))


class _Parser(jsonargparse.ArgumentParser):
    """Reports a mistake as one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(self._sentence(str(ex) if ex is not None else message))

    def _sentence(self, message: str) -> str:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        sentence = re.sub(r"required: \w+\.(\w+)", r"required: --\1", " ".join(lines))
        # Where several types are allowed the library lists what is wrong with each.
        no_type = re.search(r'Parser key "([\w.]+)".*Given value: (.*)$', sentence)
        if no_type and "Union" in sentence:
            sentence = f"--{no_type[1]} cannot be '{no_type[2]}'; its --help says what it takes."
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
        if name in _RECIPES:
            verb.add_argument(
                "--recipe", action="config", help="shipped name or .yaml file; later options win"
            )
            verb.add_class_arguments(_RECIPES[name], sub_configs=False)
        _add_parameters(verb, function)
        verbs.add_subcommand(name, verb, help=_summary(function))
    return parser


def _add_parameters(parser: jsonargparse.ArgumentParser, function: Callable[..., None]) -> None:
    """Arguments of a verb: the chief ones by position, flags without a value, the rest as options."""
    documented = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__ or "").params}
    by_hand: set[str | int] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.annotation in _RECIPES.values():
            by_hand.add(name)
        elif parameter.annotation is bool:
            parser.add_argument(f"--{name}", action="store_true", help=documented[name])
            by_hand.add(name)
        elif name in _POSITIONAL and (function, name) not in _NOT_POSITIONAL:
            several: dict[str, Any] = {"nargs": "+"} if parameter.annotation == list[str] else {}
            if parameter.default is not inspect.Parameter.empty:
                several = {"nargs": "*", "default": parameter.default}
            parser.add_argument(name, type=str, help=documented[name], **several)
            by_hand.add(name)
    parser.add_function_arguments(function, skip=by_hand, as_positional=False)


def _summary(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def main(arguments: list[str] | None = None) -> None:
    """Run a verb. A mistake of the user ends in one sentence and exit code 2, a failed run in 1."""
    arguments = _with_recipe_paths(list(sys.argv[1:] if arguments is None else arguments))
    try:
        parser = build_parser()
        values = parser.instantiate(parser.parse_args(arguments))
        if values.verb is None:
            parser.print_help()
            return
        settings = dict(vars(values[values.verb]))
        if (kind := _RECIPES.get(values.verb)) is not None:
            settings.pop("recipe", None)
            settings["recipe"] = kind(**{f.name: settings.pop(f.name) for f in dataclasses.fields(kind)})
        _quieten()
        _tell_notes()
        VERBS[values.verb](**settings)
    except InputError as error:
        fail(str(error))
    except Terminated as error:
        print(f"calm: {error}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except RunError as error:
        print(f"calm: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("calm: interrupted", file=sys.stderr)
        sys.exit(130)


def _quieten() -> None:
    """Keep the bars of training and tokenizing, not those of every file that is read or written."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


class _Notes(logging.Handler):
    """Prints what the package has to say to standard error, wherever that leads at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one note."""
        print(f"calm: {self.format(record)}", file=sys.stderr, flush=True)


def _tell_notes() -> None:
    """Print notes (the package's loggers, from INFO on), once for all processes of a run."""
    logger = logging.getLogger("calm")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
    logger.propagate = False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def _with_recipe_paths(arguments: list[str]) -> list[str]:
    """Replace the names of shipped recipes behind --recipe by their paths."""
    from calm.training.recipe_files import find_recipe

    result = list(arguments)
    kind = _RECIPES.get(arguments[0]) if arguments else None
    if kind is None:
        return result
    try:
        for i, argument in enumerate(arguments):
            if argument.startswith("--recipe="):
                result[i] = "--recipe=" + find_recipe(argument.removeprefix("--recipe="), kind)
            elif argument == "--recipe" and i + 1 < len(arguments):
                result[i + 1] = find_recipe(arguments[i + 1], kind)
    except InputError as error:
        fail(str(error))
    return result
