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
from calm.storage.folders import free_name
from calm.training.processes import processes

logger = logging.getLogger(__name__)
_PREFIX, _STAGING = "checkpoint-", ".partial"
_ZIPPED = (".pt", ".pth", ".bin")  # torch's files are zip archives, with a checksum for each part.


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, sorted by step."""
    found = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and path.name.startswith(_PREFIX) and path.name.removeprefix(_PREFIX).isdecimal()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


@contextlib.contextmanager
def written_checkpoint(folder: Path, step: int, keep: int, spared: int | None = None) -> Iterator[Path]:
    """Yield a staging folder for a checkpoint; if the block succeeds, rename it and remove old checkpoints.

    A run killed in between leaves nothing that looks like a complete checkpoint. All processes call this
    together, and each may write a part.

    Args:
        folder: Folder of the checkpoints.
        step: The step after which it is written.
        keep: Number of checkpoints to keep, this one included.
        spared: The step of another checkpoint to keep.
    """
    name, staging = f"{_PREFIX}{step}", folder / _STAGING
    partial, everyone = staging / name, processes()
    if everyone.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
    everyone.wait_for_everyone()
    try:
        yield partial
    except BaseException:
        if everyone.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    everyone.wait_for_everyone()
    if everyone.is_main_process:
        write_checksums(partial)
        _sync(partial)
        partial.rename(folder / name)
        shutil.rmtree(staging)
        old = checkpoints_in(folder)[: -max(1, keep)]
        remove_checkpoints([checkpoint for checkpoint in old if step_of(checkpoint) != spared])
    everyone.wait_for_everyone()


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


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint, the same for all processes; None if there is none yet.

    Newer, damaged ones are reported and moved aside.

    Raises:
        InputError: If there are checkpoints, and all are damaged.
    """
    answer: list[str | InputError | None] = [None]
    if processes().is_main_process:
        try:
            found = _set_damaged_aside(folder)
            answer[0] = str(found) if found else None
        except InputError as error:
            answer[0] = error
    if processes().num_processes > 1:
        answer = broadcast_object_list(answer)
    if isinstance(answer[0], InputError):
        raise answer[0]
    return Path(answer[0]) if answer[0] else None


def _set_damaged_aside(folder: Path) -> Path | None:
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints_in(folder)):
        problems = problems_of(checkpoint)
        if not problems:
            for bad, what in damaged.items():
                aside = free_name(bad.with_name(f"damaged-{bad.name}"))
                bad.rename(aside)
                logger.warning(
                    "the checkpoint '%s' is damaged (%s); continuing from '%s', the newest intact one. The "
                    "damaged one was renamed to '%s'.",
                    bad, what, checkpoint.name, aside.name,
                )  # fmt: skip
            return checkpoint
        damaged[checkpoint] = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
    if damaged:
        newest, what = next(iter(damaged.items()))
        raise InputError(
            f"no checkpoint in '{folder}' is intact: '{newest.name}' is damaged ({what}). Restore it from a "
            "copy, or move that folder away, and --resume will start this stage from the beginning."
        )
    return None


def problems_of(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint.

    Those of earlier versions have no checksums: their files must exist and be readable.
    """
    try:
        return find_damage(checkpoint)
    except FileNotFoundError:
        return [*_missing(checkpoint), *_unreadable(checkpoint)]


def _missing(checkpoint: Path) -> Iterator[str]:
    names = [path.name for path in checkpoint.iterdir()]
    if not any("model" in name for name in names):
        yield "the weights are missing"
    for part, what in (("trainer_state.json", "the training state"), ("optimizer", "the optimizer"),
                       ("scheduler.pt", "the schedule"), ("rng_state", "the random states")):  # fmt: skip
        if not any(name.startswith(part) for name in names):
            yield f"{what} is missing ({part})"


def _unreadable(checkpoint: Path) -> Iterator[str]:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _is_whole(path):
            yield f"{path.relative_to(checkpoint)} is empty or damaged"


def _is_whole(path: Path) -> bool:
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
