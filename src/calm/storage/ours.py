"""Which folders a command may replace: those that a calm command wrote, with nothing else in them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from calm.errors import InputError
from calm.storage.disk import unfinished_name
from calm.storage.locks import LOCK

_ANYTHING: dict[str, Any] = {"**": None}  # For contents moved aside or unfinished, which were checked before.
_DESKTOP_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")


def _written(*names: str) -> dict[str, None]:
    """Names of files, and of what interrupted writes of them leave, also by earlier versions."""
    leftovers = (
        name for file in names for name in (unfinished_name(file, "*"), f"{Path(file).stem}.partial")
    )
    return dict.fromkeys((*names, *leftovers))


# Name pattern -> None for a file; for a folder, what may be in it.
_TOKENIZER = dict.fromkeys(
    ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
     "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "checksums.json")
) | {"additional_chat_templates": dict.fromkeys(("*.jinja",))}  # fmt: skip
_MODEL = _TOKENIZER | dict.fromkeys(
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "config.json",
     "adapter_model.safetensors", "adapter_config.json", "thoughts.json", "generation_config.json",
     "recipe.yaml", "README.md", unfinished_name("README.md", "*"))
)  # fmt: skip
_DATASET = dict.fromkeys(("data-*-of-*.arrow", "dataset_info.json", "state.json", "cache-*.arrow", "tmp*"))
_PREPARED = dict.fromkeys(("prepared.json", "checksums.json")) | {
    "train": _DATASET,
    "validation": _DATASET,
    "tokenizer": _TOKENIZER,
    "blocks": dict.fromkeys(("train-*.arrow", "validation-*.arrow", "*.arrow.sum", "tmp*")),
}
_SHARDS = dict.fromkeys(("*.distcp", ".metadata"))  # torch's distributed checkpoints.
_CHECKPOINT = _MODEL | dict.fromkeys(
    ("optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json",
     "training_args.bin", "position_*.json", "inputs.json", "pytorch_model*.bin")
) | {"optimizer_*": _SHARDS, "pytorch_model_fsdp_*": _SHARDS}  # fmt: skip
_EVENTS: dict[str, Any] = {"events.out.tfevents.*": None}
_STAGE: dict[str, Any] = {
    "checkpoint-*": _CHECKPOINT,
    "damaged-checkpoint-*": _CHECKPOINT,
    "tensorboard": _EVENTS | {"[0-9]*": _EVENTS},
    **_written("trackers.json"),
    ".partial": _ANYTHING,
}
_RUN = _written(
    "recipe.yaml", "history.json", "inputs.json", "report.html", "report-[0-9]*.html", "scores.json",
    "teacher.json",
) | dict.fromkeys(
    ("damaged-history.json", "scores.json.sum", LOCK, ".data.lock", ".data.work.lock", ".model.lock",
     ".autoencoder.lock", ".adapter.lock")
) | dict.fromkeys(
    (".data.work", ".replacing", ".replaced", ".gone", ".data.partial", ".model.partial",
     ".autoencoder.partial", ".adapter.partial"), _ANYTHING
)  # fmt: skip
_TRAINED = _RUN | {
    "data": _PREPARED,
    "autoencoder": _MODEL,
    "model": _MODEL,
    "model-[0-9]*": _MODEL,
    "checkpoints": {"autoencoder": _STAGE, "language_model": _STAGE},
}
_FINETUNED = (
    _RUN
    | _written("examples.json", "answers.jsonl")
    | dict.fromkeys(("model", "adapter", "model-[0-9]*", "adapter-[0-9]*"), _MODEL)
    | {"checkpoints": _STAGE}
)


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that a command may replace by another of that kind.

    Args:
        name: What such a folder contains, for messages.
        sign: The file by which such a folder is recognized.
        words: Text that this file always contains.
        parts: What may be in such a folder.
    """

    name: str
    sign: str
    words: tuple[str, ...]
    parts: Mapping[str, Any]

    def matches(self, folder: Path) -> bool:
        """Whether the folder has the file `sign`, as written by calm."""
        try:
            text = (folder / self.sign).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return False
        return all(word in text for word in self.words)


TRAINED = FolderKind(
    "a run of calm train", "recipe.yaml", ("\nchunk_size:", "\ndata:", "\nlanguage_model:"), _TRAINED
)
FINETUNED = FolderKind("a run of calm finetune", "recipe.yaml", ("\nexamples:", "\nlora:"), _FINETUNED)
PREPARED = FolderKind("prepared text", "prepared.json", ('"sources"', '"vocab_size"', '"seed"'), _PREPARED)
MODEL = FolderKind("a model of calm", "config.json", ('"model_type": "calm',), _MODEL)


def check_replaceable(path: Path, kind: FolderKind) -> None:
    """Check that removing a folder loses nothing that the user would miss.

    Args:
        path: The folder.
        kind: The kind of folder that the command writes.

    Raises:
        InputError: If it is or contains the current folder or the home folder; if it is of another kind; or
            if it contains anything that is not part of that kind.
    """
    resolved = path.resolve()
    for protected, name in ((Path.cwd(), "the current folder"), (Path.home(), "your home folder")):
        if resolved in (protected.resolve(), *protected.resolve().parents):
            raise InputError(
                f"'{path}' is or contains {name}, which is never replaced; choose another output."
            )
    if not kind.matches(path):
        raise InputError(
            f"'{path}' cannot be replaced: it does not hold {kind.name} (which has its own {kind.sign}). "
            "Choose another output, or remove it yourself."
        )
    if foreign := next(_foreign(path, kind.parts), None):
        raise InputError(
            f"'{path}' cannot be replaced: it holds '{foreign.relative_to(path)}', which is not part of "
            f"{kind.name}. Move that away, or choose another output."
        )


def _foreign(folder: Path, parts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield what is in a folder but not among its parts; not links, since removing one keeps its target."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name in _DESKTOP_FILES:
            continue
        is_folder = path.is_dir()
        matching = [
            inner
            for pattern, inner in parts.items()
            if fnmatchcase(path.name, pattern) and is_folder == (inner is not None)
        ]
        if not matching:
            yield path
        elif is_folder and all(inner is not _ANYTHING for inner in matching):
            yield from _foreign(path, matching[0])
