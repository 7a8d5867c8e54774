"""Mistakes in options and recipes, each as one plain sentence: what is wrong, which value, what was meant.

jsonargparse's messages are for programmers. Here the kind and location of a mistake are parsed from them, and
restated with the names and types of the command at hand.
"""

import dataclasses
import difflib
import itertools
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_MIN_RATIO = 0.75  # difflib ratio from which on a name is suggested.
_LONGEST_VALUE = 60  # Characters of a value that is shown.
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_LISTS = {int: "a list of whole numbers, such as [1,2]", str: "a list of texts, such as [a,b]"}


@dataclass(frozen=True)
class Options:
    """The options of a command, or the settings of a recipe.

    Args:
        types: Dotted names and their types.
        positional: Names of positional arguments.
        command: The command; empty for a recipe.
        arguments: The arguments that the command was given.
    """

    types: Mapping[str, Any]
    positional: Sequence[str] = ()
    command: str = ""
    arguments: Sequence[str] = ()

    def expand_abbreviations(self, arguments: Sequence[str]) -> list[str]:
        """Arguments with abbreviated options written in full; ambiguous ones stay as they are."""
        known = [f"--{name}" for name in self.types if name not in self.positional]
        result = list(arguments)
        for i, argument in enumerate(itertools.takewhile(lambda a: a != "--", arguments)):
            given, equals, value = argument.partition("=")
            matches = [option for option in known if option.startswith(given)]
            if given.startswith("--") and given not in known and len(matches) == 1:
                result[i] = matches[0] + equals + value
        return result

    def shown(self, name: str) -> str:
        """A name as the user wrote it: an option with dashes, a positional argument, or a key."""
        option = f"--{name}"
        given = [argument.split("=")[0] for argument in self.arguments if argument.startswith("--")]
        # It may have been given with its group (--data), or with a key of its mapping (--head.num_steps).
        is_option = any(option.startswith(other) or other.startswith(f"{option}.") for other in given)
        return option if is_option and name not in self.positional else name


def types_of(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted names and types of a recipe's settings and of their groups."""
    hints: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        hints[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            hints |= types_of(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return hints


def unknown_command(name: str, commands: Iterable[str]) -> str:
    """The message for a command that does not exist, or an option in its place."""
    if name.startswith("-"):
        return f"unrecognized option {name}; options come after a command, as in: calm train {name}"
    near = difflib.get_close_matches(name, list(commands), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"give one of: {', '.join(commands)}."
    return f"there is no command '{name}'; {hint}"


def mistake_in(values: Mapping[str, Any], options: Options, prefix: str = "") -> str | None:
    """The message for the first setting that does not exist, is not a group but should be, or has no value.

    Args:
        values: Settings in groups, as in a recipe.
        options: The settings that exist.
        prefix: Dotted name of the group that they are in, with a trailing dot.
    """
    for key, value in values.items():
        name = f"{prefix}{key}"
        hint = options.types.get(name)
        if hint is None and not _is_in_mapping(name, options):
            return unknown(options, name)
        is_group = dataclasses.is_dataclass(hint)
        if is_group and isinstance(value, Mapping):
            if (inner := mistake_in(value, options, f"{name}.")) is not None:
                return inner
        elif is_group or (value is None and not _may_be_null(hint)):
            return wrong_value(options, name, "null" if value is None else str(value))
    return None


def explain(message: str, options: Options) -> str:
    """jsonargparse's message about arguments or a recipe, as one plain sentence."""
    text = " ".join(message.split()).removeprefix('Parser key "recipe": ')
    for pattern, restate in _RESTATED:
        if match := re.search(pattern, text):
            return restate(options, *match.groups())
    return re.sub(r'Parser key "([^"]+)": ', r"\1: ", text)


def wrong_value(options: Options, name: str, value: str) -> str:
    """The message for a value of a type that a setting does not take."""
    hint = options.types.get(name)
    if nested := re.match(r"NestedArg\(key='([^']*)'", value):  # A key of something that is not a mapping.
        return unknown(options, f"--{name}.{nested[1]}")
    value = value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + "..."
    got = {"": "nothing", "None": "null", "null": "null"}.get(value, f"'{value}'")
    return f"{options.shown(name)} must be {_in_words(hint)}, got {got}."


def unknown(options: Options, name: str) -> str:
    """The message for a setting that does not exist, with dashes if it was given as an option."""
    dashes = "--" if name.startswith("-") else ""
    problem = f"unrecognized option {name}" if dashes else f"there is no setting '{name}'"
    similar = _similar(name.lstrip("-"), options.types)
    if dashes and similar and similar[0] in options.positional:
        usage = f"calm {options.command} {' '.join(options.positional)}"
        return f"{problem}; {similar[0]} is a positional argument, as in: {usage}"
    if similar:
        return f"{problem}; did you mean {_listed([dashes + other for other in similar], 'or')}?"
    full_help = "--help_all" if "help_all" in options.types else "--help"
    return f"{problem}; see calm {options.command} {full_help}." if dashes else f"{problem}."


def _similar(name: str, known: Iterable[str]) -> list[str]:
    """The known dotted names most similar to a name; several if they are equally similar.

    The last parts must be similar, and also the full names, or the name and as many last parts of the other.
    """
    parts = name.split(".")

    def similarity(other: str) -> float:
        others = other.split(".")
        full = max(_ratio(name, other), _ratio(name, ".".join(others[-len(parts) :])))
        return min(_ratio(parts[-1], others[-1]), full)

    scores = {other: similarity(other) for other in known}
    best = max(scores.values(), default=0.0)
    return [other for other, score in scores.items() if score == best and best >= _MIN_RATIO]


def _ratio(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _in_words(hint: Any) -> str:
    """The values of a type in words, such as "a whole number"."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        longest_last = sorted((_in_words(option) for option in inner if option is not type(None)), key=len)
        return _listed(longest_last, "or")
    if get_origin(hint) is Literal:
        return _listed(inner, "or")
    if get_origin(hint) is list:
        return _LISTS[inner[0]]
    if get_origin(hint) is dict:
        return """a mapping, such as '{"num_steps": 2}'"""
    if dataclasses.is_dataclass(hint):
        return "a mapping of settings"
    return _WORDS.get(hint, "of another type")


def _listed(names: Sequence[str], word: str) -> str:
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last


def _may_be_null(hint: Any) -> bool:
    return hint is Any or hint is None or type(None) in get_args(hint)


def _is_in_mapping(name: str, options: Options) -> bool:
    """Whether a dotted name is a key inside a setting that is a mapping."""
    groups = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
    return any(get_origin(options.types.get(group)) is dict for group in groups)


def _unrecognized(options: Options, text: str) -> str:
    given = max((a for a in options.arguments if f"{text} ".startswith(f"{a} ")), key=len, default=text)
    if not given.startswith("-"):
        return f"unexpected argument '{given}'; see calm {options.command} --help."
    if not given.startswith("--"):
        return f"unrecognized option {given}; put -- before text that begins with a dash."
    return unknown(options, given.split("=")[0])


def _missing(options: Options, names: str) -> str:
    missing = [name.removeprefix(f"{options.command}.").lstrip("-") for name in names.split(", ")]
    shown = _listed([name if name in options.positional else f"--{name}" for name in missing], "and")
    return f"missing {shown}; see calm {options.command} --help."


def _ignored_value(options: Options, name: str, value: str) -> str:
    if name.startswith("--"):
        return f"{name} takes no value, got '{value}'."
    return f"unrecognized option {name.split('/')[0]}{value}; put -- before text that begins with a dash."


# Patterns of jsonargparse's messages, and what restates them; it gets the options and the pattern's groups.
_RESTATED: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"^unrecognized arguments: ?(.*)$", _unrecognized),
    (r"^(--print_\w+) is no longer", unknown),
    (r"does not accept option '([^']*)'", unknown),
    (r"^the following arguments are required: (.*)$", _missing),
    (r"^argument (-[^:]*?): ignored explicit argument '(.*)'$", _ignored_value),
    (r"^argument ([^:/]+)[^:]*: expected .*argument", lambda _, name: f"{name} needs a value."),
    (
        r"^ambiguous option: (\S+) could match (.*)$",
        lambda _, name, names: f"{name} could be {_listed(names.split(', '), 'or')}; write it in full.",
    ),
    (
        r'^Invalid option "(.*)" for (--\S+)$',
        lambda _, value, name: f"{name} cannot be '{value}'; it takes skip_default or skip_unset.",
    ),
    # A group that is given as a mapping with an invalid value.
    (
        r'^Parser key "[^"]+": Unable to load config \'.*?\' - Parser key "([^"]+)": '
        r"(?!Unable to load).*(?:Got|Given) value: ?(.*)$",
        wrong_value,
    ),
    (r'^Parser key "([^"]+)": Unable to load config \'(.*?)\' - ', wrong_value),
    (r'^Parser key "([^"]+)": .*(?:Got|Given) value: ?(.*)$', wrong_value),
)
