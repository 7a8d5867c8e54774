"""Help that fits on one screen for commands with a recipe, and shell completion."""

import argparse
import shutil
import textwrap
from collections.abc import Callable

import docstring_parser
import jsonargparse

SHELLS = ("bash", "zsh", "fish")
# The options that most runs need; --help_all prints all of them.
_MAIN = {
    "train": (
        "--recipe", "--data.sources", "--output", "--resume", "--overwrite", "--seed", "--chunk_size",
        "--model", "--language_model.training.steps", "--language_model.init_from",
    ),
    "finetune": (
        "--recipe", "--model", "--examples.sources", "--output", "--resume", "--overwrite", "--seed",
        "--training.steps", "--lora.rank",
    ),
}  # fmt: skip


def brief_help(command: str, parser: jsonargparse.ArgumentParser, function: Callable[..., None]) -> str:
    """What a command does, with examples and its main options.

    Args:
        command: Its name.
        parser: Its parser.
        function: Its function; the docstring has the examples.
    """
    documented = docstring_parser.parse(function.__doc__ or "")
    formatter = argparse.RawDescriptionHelpFormatter(prog=f"calm {command}", max_help_position=34)
    formatter.add_usage(f"calm {command} [options]", [], [], "usage: ")
    width = shutil.get_terminal_size().columns
    formatter.add_text(textwrap.fill(documented.short_description or "", width))
    examples = "\n".join(example.description or "" for example in documented.examples)
    formatter.add_text("\n  ".join(["examples:", *examples.splitlines()]))
    formatter.start_section("chief options")
    for name in _MAIN[command]:
        option = parser._option_string_actions[name]
        formatter.add_argument(_brief(name, option))
    formatter.end_section()
    formatter.add_text(f"All options: calm {command} --help_all. Shipped recipes: calm recipes.")
    return formatter.format_help()


def _brief(name: str, option: argparse.Action) -> argparse.Action:
    """An option for argparse's formatter, with its default if that is informative."""
    help_text = " ".join((option.help or "").split())
    is_informative = option.default not in (None, False, argparse.SUPPRESS, [], "")
    default = f" (default: {option.default})" if is_informative else ""
    is_flag = option.nargs == 0
    return argparse.Action(
        option_strings=[name],
        dest=option.dest,
        nargs=0 if is_flag else None,
        metavar=None if is_flag else name.rpartition(".")[2].lstrip("-").upper(),
        help=f"{help_text}{default}".replace("%", "%%"),
    )


def completion(shell: str, parser: jsonargparse.ArgumentParser) -> str:
    """The completion script for commands and options, which the shell has to evaluate.

    Args:
        shell: One of `SHELLS`.
        parser: The parser of all commands; it cannot be used afterwards.
    """
    return parser.get_completion_script(f"shtab-{shell}")
