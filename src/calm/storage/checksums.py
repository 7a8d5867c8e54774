"""Checksums of the files in a folder, written along with them, so that damage is detected and named.

BLAKE2b of the standard library, about 1 GB per second and core. Protects against accidents, not forgery.
"""

import functools
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from calm.errors import InputError

CHECKSUMS = "checksums.json"
_BYTES_AT_ONCE = 1 << 20
_FILES_AT_ONCE = 4  # Hashing and reading release the GIL.
_FOR_READERS = (".md", ".yaml", ".html")  # The user may edit these; no result depends on them.


def write_checksums(folder: Path) -> None:
    """Write sizes and checksums of all files below a folder into it, except files meant for people."""
    files = {path.relative_to(folder).as_posix(): path for path in _files_below(folder)}
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        sums = dict(zip(files, threads.map(_describe, files.values()), strict=True))
    text = json.dumps({"algorithm": "blake2b-128", "files": sums}, indent=1) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def find_damage(folder: Path) -> list[str]:
    """Describe damaged files, such as "optimizer.pt has 0 bytes instead of 4096"; empty if all are intact.

    Files added later are ignored.

    Raises:
        FileNotFoundError: If the folder has no checksums.
    """
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(file["bytes"]), str(file["blake2b"])) for name, file in recorded.items()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{CHECKSUMS} cannot be read"]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        problems = threads.map(lambda item: _compare(folder, item[0], *item[1]), expected.items())
        return [problem for problem in problems if problem]


def check_intact(folder: Path) -> None:
    """Check that the files of a folder are as they were written; a folder without checksums passes.

    Raises:
        InputError: If a file is not.
    """
    try:
        problems = find_damage(folder)
    except FileNotFoundError:
        return
    if problems:
        raise InputError(
            f"'{folder}' is damaged or was modified: {problems[0]}. Restore it from a copy; if the change "
            f"was intended, remove '{folder / CHECKSUMS}'."
        )


def write_file_checksum(file: Path) -> None:
    """Write the checksum of a single file beside it."""
    _checksum_file_of(file).write_text(json.dumps(_describe(file)) + "\n", encoding="utf-8")


def matches_checksum(file: Path) -> bool:
    """Whether a file is as `write_file_checksum` found it; False without a checksum."""
    try:
        recorded = json.loads(_checksum_file_of(file).read_text(encoding="utf-8"))
        return bool(recorded == _describe(file))
    except (OSError, ValueError, RecursionError):
        return False


def _checksum_file_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sum")


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _has_checksum(path))


def _has_checksum(path: Path) -> bool:
    return path.is_file() and path.name != CHECKSUMS and path.suffix not in _FOR_READERS


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "blake2b": _checksum(path)}


def _compare(folder: Path, name: str, size: int, checksum: str) -> str | None:
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        return None if _checksum(path) == checksum else f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _checksum(path: Path) -> str:
    status = path.stat()
    return _checksum_at(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(4096)  # One command opens the same folder several times.
def _checksum_at(path: Path, *_: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BYTES_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
