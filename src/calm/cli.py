"""The command line: arguments of the commands (`calm.commands`), and user errors as one sentence."""

import argparse
import dataclasses
import inspect
import itertools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import docstring_parser
import jsonargparse
import yaml

import calm
from calm.command_help import SHELLS, brief_help, completion
from calm.commands import COMMANDS
from calm.errors import InputError, RunError, Terminated, reason_of
from calm.mistakes import Options, explain, mistake_in, types_of, unknown_command
from calm.progress import is_first_process, print_line, show_progress, write_lines_for_bars
from calm.terminal import make_streams_robust
from calm.training.finetuning_recipe import FinetuningRecipe
from calm.training.recipe import Recipe

# Commands that follow a recipe, whose fields are their options.
_RECIPES: dict[str, type] = {"train": Recipe, "finetune": FinetuningRecipe}
_POSITIONAL = ("model", "folder", "sources", "data", "prompt", "target", "runs", "run", "question", "task")
_SHORT = {"samples": "-n", "file": "-f"}
_QUIET = "Print results, warnings and errors only."
_FLAG: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
_OTHER_OPTIONS = ("output", "resume", "overwrite", "quiet", "help_all")  # Of commands with a recipe.
_NOT_POSITIONAL = ((COMMANDS["import"], "model"), (COMMANDS["compare"], "data"))


class _RecipeParser(jsonargparse.ArgumentParser):
    """Parser of a command with a recipe. With --print_config, it prints only the recipe.

    The command's other options are left out, so that every command that takes a recipe can read the result.
    """

    def dump(self, namespace: jsonargparse.Namespace, *args: Any, **kwargs: Any) -> str:
        """The recipe as YAML."""
        recipe = namespace.clone()
        for name in _OTHER_OPTIONS:
            recipe.pop(name, None)
        return super().dump(recipe, *args, **kwargs)


def fail(message: str) -> NoReturn:
    """Print a user error and exit with code 2."""
    _print_error(message)
    sys.exit(2)


def _print_error(message: str) -> None:
    """Print an error on one line, even if a name in it has line breaks.

    With `CALM_TRACEBACK=1` in the environment, its traceback comes first: the sentence names the cause of an
    error in a user's own head, optimizer or file format, but not its line.
    """
    if os.environ.get("CALM_TRACEBACK", "0") not in ("", "0") and sys.exc_info()[1] is not None:
        traceback.print_exc()
    print(f"calm: error: {' '.join(message.splitlines())}", file=sys.stderr)


def build_parser(names: Iterable[str] = COMMANDS) -> jsonargparse.ArgumentParser:
    """The parser of some or all commands. It raises errors instead of exiting.

    Args:
        names: The commands; to run one, the options of the others need not be collected.
    """
    about = "Continuous autoregressive language models."
    parser = jsonargparse.ArgumentParser(
        prog="calm", description=about, exit_on_error=False, allow_abbrev=True
    )
    parser.add_argument("--version", action="version", version=f"calm {calm.__version__}")
    parser.add_argument("--completion", choices=SHELLS, help="print completion for a shell, to be evaluated")
    commands = parser.add_subcommands(dest="command", required=False)
    for name in names:
        function = COMMANDS[name]
        kind = _RecipeParser if name in _RECIPES else jsonargparse.ArgumentParser
        command = kind(description=_summary(function), allow_abbrev=True)
        if name in _RECIPES:
            command.add_argument(
                "--recipe", action="config", help="Shipped name or .yaml file; options after it override it."
            )
            command.add_class_arguments(_RECIPES[name], sub_configs=False)
            command.add_argument("--help_all", help="Print every option.", **_FLAG)
        _add_parameters(command, function)
        command.add_argument("--quiet", help=_QUIET, **_FLAG)
        commands.add_subcommand(name, command, help=_summary(function))
    return parser


def _add_parameters(parser: jsonargparse.ArgumentParser, function: Callable[..., None]) -> None:
    """Add the arguments of a command: the main ones are positional, booleans are flags, the rest options."""
    documented = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__ or "").params}
    added: set[str | int] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.annotation in _RECIPES.values():
            added.add(name)
        elif parameter.annotation is bool:
            parser.add_argument(f"--{name}", action="store_true", help=documented[name])
            added.add(name)
        elif name in _positional_of(function):
            number: dict[str, Any] = {"nargs": "+"} if parameter.annotation == list[str] else {}
            if parameter.default is not inspect.Parameter.empty:
                number = {"nargs": "?" if parameter.annotation is str else "*", "default": parameter.default}
            parser.add_argument(name, type=str, help=documented[name], **number)
            added.add(name)
        elif name in _SHORT:
            kind, default = parameter.annotation, parameter.default
            parser.add_argument(_SHORT[name], f"--{name}", type=kind, default=default, help=documented[name])
            added.add(name)
    parser.add_function_arguments(function, skip=added, as_positional=False)


def _positional_of(function: Callable[..., None]) -> list[str]:
    """The positional parameters of a command."""
    names = [name for name in inspect.signature(function).parameters if name in _POSITIONAL]
    return [name for name in names if (function, name) not in _NOT_POSITIONAL]


def _options_of(command: str, arguments: list[str]) -> Options:
    """The options of a command, to explain errors in its arguments."""
    hints = get_type_hints(COMMANDS[command])
    hints |= {"quiet": bool, "help_all": bool} if command in _RECIPES else {"quiet": bool}
    hints.pop("return")
    if (kind := _RECIPES.get(command)) is not None:
        hints = {**hints, "recipe": str, **types_of(kind)}
    options = Options(hints, _positional_of(COMMANDS[command]), command)
    return dataclasses.replace(options, arguments=options.expand_abbreviations(arguments))


def _summary(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").splitlines()[0]


def main(arguments: list[str] | None = None) -> None:
    """Run a command. A user error prints one sentence and exits with code 2, a failed run with 1."""
    make_streams_robust()
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except InputError as error:
        fail(str(error))
    except Terminated as error:
        print(f"calm: {error}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except RunError as error:
        _print_error(str(error))
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _print_error(f"out of memory ({reason_of(error)}); reduce the batch size or the context length.")
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"'{error.filename}': {error.strerror}.")
    except KeyboardInterrupt:
        print("calm: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # At interpreter exit, a closed pipe would print a traceback.


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory; torch has its own errors for that."""
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _run(arguments: list[str]) -> None:
    """Run the command named by the first argument; without arguments, print help."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(build_parser().format_help().rstrip())
        return
    command = arguments[0]
    if command not in COMMANDS:
        _run_option(arguments)
        return
    if command in _RECIPES and _print_help(command, arguments[1:]):
        return
    settings = _parse(command, arguments)
    is_quiet = settings.pop("quiet", False)
    _set_up_progress(is_quiet)
    _set_up_logging(is_quiet)
    COMMANDS[command](**settings)


def _run_option(arguments: list[str]) -> None:
    """Print help, the version or a completion script; anything else is an unknown command."""
    option = arguments[0]
    if option.split("=")[0] == "--completion":
        shell = _value_of("--completion", arguments)
        if shell not in SHELLS:
            raise InputError(f"--completion takes {', '.join(SHELLS)}; got '{shell or ''}'.")
        print(completion(shell, build_parser()))
        return
    known = ("-h", "--help", "--version")
    if not option or not any(name.startswith(option) for name in known):
        raise InputError(unknown_command(option, COMMANDS))
    build_parser().parse_args([option])


def _print_help(command: str, arguments: list[str]) -> bool:
    """If asked for, print the brief or full help of a command with a recipe; return whether it was."""
    requested = {"-h", "--help", "--help_all"} & set(arguments)
    if not requested:
        return False
    subcommands: Any = build_parser([command])._subcommands_action
    parser = subcommands.choices[command]
    is_full = "--help_all" in requested
    text = parser.format_help() if is_full else brief_help(command, parser, COMMANDS[command])
    print(text.rstrip())
    return True


def _parse(command: str, arguments: list[str]) -> dict[str, Any]:
    """Parse the parameters of a command."""
    options = _options_of(command, arguments[1:])
    arguments = [command, *options.arguments]
    if command in _RECIPES:
        arguments = _add_recipe_of_run(arguments)
    parser = build_parser([command])
    try:
        values = parser.parse_args(_inline_recipes(arguments))
    except jsonargparse.ArgumentError as error:
        raise InputError(explain(str(error), options)) from error
    if (kind := _RECIPES.get(command)) is None:
        return dict(vars(parser.instantiate(values)[command]))
    recipe_fields = [field.name for field in dataclasses.fields(kind)]
    parsed = values[command].as_dict()
    if (mistake := mistake_in({name: parsed[name] for name in recipe_fields}, options)) is not None:
        raise InputError(mistake)
    settings = dict(vars(parser.instantiate(values)[command]))
    del settings["recipe"]  # The file, which has been read.
    settings["recipe"] = kind(**{name: settings.pop(name) for name in recipe_fields})
    return settings


def _set_up_progress(is_quiet: bool) -> None:
    """Show progress bars unless quiet, without those that libraries show for every file."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    show_progress(not is_quiet)
    if is_quiet:
        import datasets

        datasets.disable_progress_bars()
    elif not sys.stderr.isatty():
        write_lines_for_bars()


class _LogHandler(logging.Handler):
    """Prints the package's log messages to whatever standard error is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        print_line(f"calm: {self.format(record)}")


def _set_up_logging(is_quiet: bool) -> None:
    """Print the package's log messages, once for all processes of a run; if quiet, only warnings."""
    logger = logging.getLogger("calm")
    if not any(isinstance(handler, _LogHandler) for handler in logger.handlers):
        logger.addHandler(_LogHandler())
    logger.propagate = False
    level = logging.WARNING if is_quiet else logging.INFO
    logger.setLevel(level if is_first_process() else logging.ERROR)


def _add_recipe_of_run(arguments: list[str]) -> list[str]:
    """With --resume and no --recipe, use the recipe in the run folder."""
    from calm.training.recipe_settings import recipe_file_of_run

    if "--resume" not in arguments or _value_of("--recipe", arguments) is not None:
        return arguments
    if (folder := _value_of("--output", arguments)) is None:
        return arguments
    return [arguments[0], "--recipe", str(recipe_file_of_run(Path(folder))), *arguments[1:]]


def _inline_recipes(arguments: list[str]) -> list[str]:
    """Replace recipe names after --recipe with the text of the recipes, in ASCII.

    Settings of a head or other component are left out if an option chooses another kind of it.
    """
    from calm.training.recipe_settings import KINDS, compatible_settings, settings_in

    kind = _RECIPES.get(arguments[0])
    if kind is None:
        return arguments
    # A recipe file may also set the command's other options, such as output.
    others = dict.fromkeys(inspect.signature(COMMANDS[arguments[0]]).parameters, Any)
    options = Options({**others, **types_of(kind)})
    kinds = {name: _value_of(f"--{name}", arguments) for name in KINDS}

    def text_of(name: str) -> str:
        settings = compatible_settings(settings_in(name, kind, options), kinds, kind)
        return yaml.safe_dump(settings, sort_keys=False)

    result = list(arguments)
    for i, argument in enumerate(arguments):
        if argument.startswith("--recipe="):
            result[i] = "--recipe=" + text_of(argument.removeprefix("--recipe="))
        elif argument == "--recipe" and i + 1 < len(arguments):
            result[i + 1] = text_of(arguments[i + 1])
    return result


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The last value given to an option; None if there is none."""
    value = None
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value
