"""The command that chats with a model in the terminal."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from calm.commands.checks import check_counts, check_model_exists, check_sampler, check_thoughts
from calm.errors import InputError
from calm.ranges import SEEDS, Range
from calm.terminal import as_text

if TYPE_CHECKING:
    from calm.chat import Conversation
    from calm.models.generation.alternatives import Candidate

_SHOWN_TEMPERATURES = (1.0, 0.5)
_DRAWS_PER_CHUNK, _MAX_OTHERS = 200, 3
_TEMPERATURES = Range(0, 1)
_HELP = """\
/reset             clear the conversation
/system TEXT       start over with this system message, or none if TEXT is empty
/temperature T     set the temperature, from 0 to 1
/chunks            show what each chunk of the last answer could have been
/help              show this list
/exit              exit, as Ctrl+D does; Ctrl+C stops an answer"""


def chat(
    model: str,
    system: str = "",
    temperature: float = 0.5,
    sampler: str | None = None,
    max_new_tokens: int = 512,
    num_thoughts: int | None = None,
    head: dict[str, Any] | None = None,
    seed: int | None = None,
) -> None:
    """Chat with a model in the terminal; it needs a chat template.

    Args:
        model: Folder or hub name of a CALM or of any causal language model in transformers.
        system: System message.
        temperature: From 0 to 1; lower is more fluent and less varied.
        sampler: See calm generate.
        max_new_tokens: Maximum tokens of an answer.
        num_thoughts: Thoughts before each answer, which are not shown; see calm generate.
        head: Sampling settings of a CALM's head to change, such as '{"num_steps": 2}' (docs/heads.md).
        seed: Makes the answers reproducible.
    """
    if seed is not None:
        SEEDS.require("seed", seed)
    _TEMPERATURES.require("temperature", temperature)
    check_counts(None, max_new_tokens=max_new_tokens)
    check_sampler(sampler)
    check_thoughts(num_thoughts=num_thoughts)
    system = as_text(system)
    check_model_exists(model)
    from calm.chat import Conversation
    from calm.models.loading import load_language_model_and_tokenizer

    network, tokenizer = load_language_model_and_tokenizer(model, head)
    conversation = Conversation(
        network,
        tokenizer,
        system=system,
        seed=seed,
        max_new_tokens=max_new_tokens,
        num_thoughts=num_thoughts,
    )
    _Session(conversation, temperature, sampler).run()


class _Session:
    """Reads lines from the user and answers them.

    Args:
        conversation: The conversation.
        temperature: Temperature of the answers.
        sampler: Sampler of the answers.
    """

    def __init__(self, conversation: "Conversation", temperature: float, sampler: str | None) -> None:
        self._conversation, self._temperature, self._sampler = conversation, temperature, sampler
        self._commands: dict[str, Callable[[str], object]] = {
            "/reset": lambda _: self._conversation.reset(),
            "/system": self._conversation.set_system,
            "/temperature": self._set_temperature,
            "/chunks": lambda _: print_chunks(self._conversation),
            "/help": lambda _: print(_HELP),
        }

    def run(self) -> None:
        """Answer every line until the input ends."""
        if sys.stdin.isatty():
            print("/help lists the commands; Ctrl+D exits.")
        for line in _lines():
            if line.partition(" ")[0] in ("/exit", "/quit"):
                return
            try:
                self._handle(as_text(line))
            except InputError as error:
                print(f"calm: {error}", file=sys.stderr, flush=True)

    def _handle(self, line: str) -> None:
        """Run a command, or answer a message."""
        if not line.startswith("/"):
            self._answer(line)
            return
        command, _, argument = line.partition(" ")
        if command not in self._commands:
            raise InputError(f"there is no command '{command}'; /help lists them.")
        self._commands[command](argument.strip())

    def _answer(self, text: str) -> None:
        from calm.texts import show_at_once

        try:
            num_dropped = self._conversation.answer(
                text, show_at_once, temperature=self._temperature, sampler=self._sampler
            )
        except KeyboardInterrupt:
            print("\n(stopped)", flush=True)
            return
        print(flush=True)
        if num_dropped:
            print(f"calm: {num_dropped} old messages no longer fit in the context", file=sys.stderr)

    def _set_temperature(self, text: str) -> None:
        try:
            temperature = float(text)
        except ValueError:
            raise InputError(f"the temperature must be a number from 0 to 1, got '{text}'.") from None
        _TEMPERATURES.require("temperature", temperature)
        self._temperature = temperature


def print_chunks(conversation: "Conversation") -> None:
    """Print the chunks of the last answer, and what each could have been."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    def shown(tokens: Sequence[int]) -> str:
        return escape(conversation.spell(tokens).replace("\n", "⏎"))

    table = Table("chunk", *(f"T = {t:g}" for t in _SHOWN_TEMPERATURES), "what else it could have been")
    chunks = conversation.alternatives(_SHOWN_TEMPERATURES, _DRAWS_PER_CHUNK, _MAX_OTHERS + 1)
    for chunk, alternatives in chunks:
        answered = next((c for c in alternatives.candidates if list(c.tokens) == chunk), None)
        others = [c for c in alternatives.candidates if c is not answered]
        others.sort(key=lambda c: -_weights(c)[0])
        weights = [""] * len(_SHOWN_TEMPERATURES)
        if answered is not None:
            weights = [f"{weight:.0%}" for weight in _weights(answered)]
        likeliest = [f"{_weights(c)[0]:4.0%} {shown(c.tokens)}" for c in others[:_MAX_OTHERS]]
        table.add_row(shown(chunk), *weights, "\n".join(likeliest))
    Console(highlight=False).print(table)


def _weights(candidate: "Candidate") -> Sequence[float]:
    """Probabilities at the temperatures shown: the head's if it has them all, else those of the pool rule."""
    known = candidate.probabilities or []
    return [p for p in known if p is not None] if known and None not in known else candidate.chances


def _lines() -> Iterator[str]:
    """Lines that the user types or that a file contains, without blank ones."""
    prompt = "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # So that only lines that are not UTF-8 are refused.
    if prompt:
        with contextlib.suppress(ImportError):  # Not every system has it.
            import readline  # noqa: F401 (it lets `input` edit a line, and recall earlier ones)
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()
            return
        if line:
            yield line
