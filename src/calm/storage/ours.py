"""Which folders a command may replace: those that one of ours made, with nothing else in them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from calm.errors import InputError

LOCK = ".lock"
_ANYTHING: dict[str, Any] = {"**": None}  # Folders whose contents others decide, such as checkpoints.
_OF_DESKTOPS = (".DS_Store", "Thumbs.db", "desktop.ini")
# Patterns of names. A file has None, a folder what may be in it.
_TOKENIZER = dict.fromkeys(
    ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
     "chat_template.jinja", "checksums.json")
) | {"additional_chat_templates": dict.fromkeys(("*.jinja",))}  # fmt: skip
_MODEL = _TOKENIZER | dict.fromkeys(
    ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
     "adapter_config.json", "recipe.yaml", "README.md")
)  # fmt: skip
_DATASET = dict.fromkeys(("*.arrow", "dataset_info.json", "state.json", "cache-*", "tmp*"))
_PREPARED = dict.fromkeys(("prepared.json", "checksums.json")) | {
    "train": _DATASET,
    "validation": _DATASET,
    "tokenizer": _TOKENIZER,
    "blocks": dict.fromkeys(("*",)),
}
_STAGE = {
    "checkpoint-*": _ANYTHING,
    "damaged-checkpoint-*": _ANYTHING,
    "tensorboard": _ANYTHING,
    ".partial": _ANYTHING,
}
_RUN = dict.fromkeys(
    ("recipe.yaml", "history.json", "damaged-history*.json", "inputs.json", "report.html", "examples.json",
     "answers.jsonl", "*.partial", LOCK, ".*.lock")
) | {
    "data": _PREPARED,
    "autoencoder": _MODEL,
    "model": _MODEL,
    "adapter": _MODEL,
    "checkpoints": _STAGE | {"autoencoder": _STAGE, "language_model": _STAGE},
} | dict.fromkeys(  # Work that was stopped.
    (".data.work", ".replacing", ".replaced", ".gone", ".*.partial", ".*.replaced"), _ANYTHING
)  # fmt: skip


@dataclass(frozen=True)
class FolderKind:
    """Folders of which a command may replace one by another.

    Args:
        name: What such a folder holds, for messages.
        sign: The file that tells one.
        parts: What may be in it.
    """

    name: str
    sign: str
    parts: Mapping[str, Any]


RUN = FolderKind("a run", "recipe.yaml", _RUN)
PREPARED = FolderKind("prepared text", "prepared.json", _PREPARED)
MODEL = FolderKind("a model", "config.json", _MODEL)


def check_replaceable(path: Path, kind: FolderKind) -> None:
    """See that nothing is lost that a user would miss if a folder goes.

    Args:
        path: The folder.
        kind: What the command makes.

    Raises:
        InputError: If it is the current folder, a home, or above one of them; if it is of another kind; or if
            it holds anything that is not part of that kind.
    """
    place = path.resolve()
    for kept, name in ((Path.cwd(), "the current folder"), (Path.home(), "your home folder")):
        if place in (kept.resolve(), *kept.resolve().parents):
            raise InputError(f"'{path}' is or holds {name}, which is never replaced; choose another output.")
    if not (path / kind.sign).is_file():
        raise InputError(
            f"'{path}' is not replaced: it does not hold {kind.name} (it has no {kind.sign}). Choose another "
            "output, or remove it yourself."
        )
    if foreign := next(_foreign(path, kind.parts), None):
        raise InputError(
            f"'{path}' is not replaced: it holds '{foreign.relative_to(path)}', which is not part of "
            f"{kind.name}. Move that away, or choose another output."
        )


def _foreign(folder: Path, parts: Mapping[str, Any]) -> Iterator[Path]:
    """What is in a folder and is not among its parts. Links are: what they lead to stays."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name in _OF_DESKTOPS:
            continue
        is_folder = path.is_dir()
        fitting = [
            inner
            for pattern, inner in parts.items()
            if fnmatchcase(path.name, pattern) and is_folder == (inner is not None)
        ]
        if not fitting:
            yield path
        elif is_folder and all(inner is not _ANYTHING for inner in fitting):
            yield from _foreign(path, fitting[0])
