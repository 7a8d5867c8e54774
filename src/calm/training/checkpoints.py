"""Checkpoints of a stage: write them atomically, list them, and find the newest intact one.

checkpoints/<stage>/checkpoint-STEP/          with checksums.json
checkpoints/<stage>/damaged-checkpoint-STEP/  moved aside, never read
"""

import contextlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open

from calm.errors import InputError
from calm.storage.checksums import find_damage, write_checksums
from calm.storage.folders import unused_path
from calm.training.processes import processes

logger = logging.getLogger(__name__)
_PREFIX, _STAGING = "checkpoint-", ".partial"
_ZIPPED = (".pt", ".pth", ".bin")  # torch's files are zip archives, with a checksum for each part.


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, sorted by step."""
    checkpoints = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and path.name.startswith(_PREFIX) and path.name.removeprefix(_PREFIX).isdecimal()
    ]
    return sorted(checkpoints, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


@contextlib.contextmanager
def atomic_checkpoint(folder: Path, step: int, keep: int, kept_step: int | None = None) -> Iterator[Path]:
    """Yield a staging folder for a checkpoint; if the block succeeds, rename it and remove old checkpoints.

    A run killed in between leaves nothing that looks like a complete checkpoint. All processes call this
    together, and each may write a part.

    Args:
        folder: Folder of the checkpoints.
        step: The step after which it is written.
        keep: Number of checkpoints to keep, this one included.
        kept_step: The step of another checkpoint to keep.
    """
    name, staging = f"{_PREFIX}{step}", folder / _STAGING
    partial, group = staging / name, processes()
    if group.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
    group.wait_for_everyone()
    try:
        yield partial
    except BaseException:
        if group.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    group.wait_for_everyone()
    if group.is_main_process:
        write_checksums(partial)
        _sync(partial)
        partial.rename(folder / name)
        shutil.rmtree(staging)
        old = checkpoints_in(folder)[: -max(1, keep)]
        remove_checkpoints([checkpoint for checkpoint in old if step_of(checkpoint) != kept_step])
    group.wait_for_everyone()


def remove_checkpoints(checkpoints: list[Path]) -> None:
    """Remove checkpoints. Each is moved to staging first, so a kill never leaves half of one."""
    for checkpoint in checkpoints:
        staging = checkpoint.parent / _STAGING
        staging.mkdir(exist_ok=True)
        checkpoint.rename(staging / checkpoint.name)
        shutil.rmtree(staging)


def _sync(folder: Path) -> None:
    """Flush the files of a folder to disk before it gets its final name."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def newest_intact_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint, the same for all processes; None if there is none yet.

    Newer, damaged ones are reported and moved aside.

    Raises:
        InputError: If there are checkpoints, and all are damaged.
    """
    outcome: list[Path | InputError | None] = [None]  # A list, as accelerate broadcasts lists.
    if processes().is_main_process:
        try:
            outcome[0] = _find_intact(folder)
        except InputError as error:
            outcome[0] = error
    if processes().num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def _find_intact(folder: Path) -> Path | None:
    """`newest_intact_checkpoint` in one process."""
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints_in(folder)):
        problems = problems_of(checkpoint)
        if not problems:
            for newer, damage in damaged.items():
                renamed = unused_path(newer.with_name(f"damaged-{newer.name}"))
                newer.rename(renamed)
                logger.warning(
                    "the checkpoint '%s' is damaged (%s); continuing from '%s', the newest intact one. The "
                    "damaged one was renamed to '%s'.",
                    newer, damage, checkpoint.name, renamed.name,
                )  # fmt: skip
            return checkpoint
        damaged[checkpoint] = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
    if damaged:
        newest, damage = next(iter(damaged.items()))
        raise InputError(
            f"no checkpoint in '{folder}' is intact: '{newest.name}' is damaged ({damage}). Restore it from "
            "a copy, or move that folder away, and --resume will start this stage from the beginning."
        )
    return None


def problems_of(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint.

    Checkpoints of earlier versions have no checksums; their files must exist and be readable.
    """
    try:
        return find_damage(checkpoint)
    except FileNotFoundError:
        return [*_missing(checkpoint), *_unreadable(checkpoint)]


def _missing(checkpoint: Path) -> Iterator[str]:
    names = [path.name for path in checkpoint.iterdir()]
    if not any("model" in name for name in names):
        yield "the weights are missing"
    for start, content in (("trainer_state.json", "the training state"), ("optimizer", "the optimizer"),
                           ("scheduler.pt", "the schedule"), ("rng_state", "the random states")):  # fmt: skip
        if not any(name.startswith(start) for name in names):
            yield f"{content} is missing ({start})"


def _unreadable(checkpoint: Path) -> Iterator[str]:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _is_intact(path):
            yield f"{path.relative_to(checkpoint)} is empty or damaged"


def _is_intact(path: Path) -> bool:
    """Whether a file is intact, as far as its format allows checking."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in _ZIPPED:
            with zipfile.ZipFile(path) as file:
                return file.testzip() is None
        return path.stat().st_size > 0
    except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile):
        return False
