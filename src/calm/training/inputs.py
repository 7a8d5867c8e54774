"""What a run was begun with, kept in its folder: it goes on with the same or not at all."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calm.data.examples import Example
from calm.data.files import find_files, is_here
from calm.errors import InputError
from calm.storage.disk import read_json, write_file_whole

INPUTS = "inputs.json"


def check_inputs(output: Path, inputs: Mapping[str, str]) -> None:
    """Note what a run begins with, or compare it with what was noted.

    Args:
        output: Folder of the run.
        inputs: Digests by what they are of, as a message would call it.

    Raises:
        InputError: If something is not what it was.
    """
    file = output / INPUTS
    # A new run has none, and one of an earlier version.
    noted = read_json(file, dict) if file.exists() else {}
    for what, digest in inputs.items():
        if noted.get(what, digest) != digest:
            raise InputError(
                f"cannot resume '{output}': {what} changed since the run began. Put back what it was, or "
                "choose another output folder."
            )
    if noted.keys() != inputs.keys():
        write_file_whole(file, json.dumps(dict(inputs), indent=1) + "\n")


def digest_of_weights(model: nn.Module) -> str:
    """A digest of the names, types and values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_examples(parts: Iterable[Iterable[Example]]) -> str:
    """A digest of the tokens of prompts and completions."""
    tokens = [[[*map(int, one.prompt)], [*map(int, one.completion)]] for part in parts for one in part]
    return _digest(tokens)


def digest_of_files(sources: Iterable[str]) -> str:
    """A digest of the names and lengths of files: what is streamed is too much to be read first."""
    files = [file for source in sources if is_here(source) for file in find_files(Path(source))]
    return _digest([[file.name, file.stat().st_size] for file in files])


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
