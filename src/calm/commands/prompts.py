"""The prompts of a command: from its arguments, a file, or standard input."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from calm.errors import InputError
from calm.terminal import as_text

STANDARD_INPUT = "-"


def prompts_of(arguments: Sequence[str], file: str | None) -> list[str]:
    """Prompts from the command line, followed by those from a file.

    Args:
        arguments: Prompts.
        file: A text file with one prompt per non-blank line; or a .jsonl file whose lines are strings, or
            objects with a "prompt"; or "-" for lines of text on standard input.

    Raises:
        InputError: If there is no prompt, the file is not UTF-8, or one of its lines is not a prompt.
        OSError: If the file cannot be read.
    """
    prompts = [as_text(text) for text in arguments]
    if file is not None:
        prompts += _prompts_in(file)
    if not prompts:
        raise InputError("there is no prompt; give a text, or --file FILE ('-' for standard input).")
    return prompts


def _prompts_in(file: str) -> list[str]:
    is_jsonl = Path(file).suffix == ".jsonl"
    # Not splitlines, which also splits at characters that may occur inside a prompt.
    lines = [line.removesuffix("\r") for line in _text_of(file).split("\n")]
    return [
        _prompt_of(line, f"'{file}', line {number}") if is_jsonl else line
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _text_of(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == STANDARD_INPUT else Path(file).read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompts in '{file}' are not UTF-8 ({error.reason}).") from error


def _prompt_of(line: str, location: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{location} is not JSON.") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise InputError(f'{location} must be a string, or an object with a "prompt" that is one.')
    return as_text(prompt)  # JSON can escape lone surrogates.
