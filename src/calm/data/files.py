"""The files of a source: known formats, compressed or not, and what is left out below a folder.

Left out below a folder are: other formats, hidden files and folders, those of systems and tools (trash,
caches, installed packages), what calm itself wrote (runs, prepared text, models), datasets written by
`save_to_disk`, broken links, folders that cannot be opened, and files already read under another name. A file
that the user names directly is read, as plain text if its format is unknown.
"""

import logging
import os
import stat
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from calm.data.compression import name_without_compression
from calm.data.formats import format_of, known_suffixes
from calm.data.plain import check_plain_text
from calm.data.rows import is_saved
from calm.errors import InputError, reason_of

logger = logging.getLogger(__name__)
_OF_TOOLS = {
    "__macosx",
    "__pycache__",
    "__pypackages__",
    "node_modules",
    "site-packages",
    "lost+found",
    "system volume information",
    "$recycle.bin",
    "recycler",
    "#recycle",
    "@recycle",
    "#snapshot",
    "@recently-snapshot",
    "@eadir",
}
_OTHERS = "other formats"
_SUFFIXES_TOLD, _LONGEST_SUFFIX = 5, 12
_ENDS_OF_TOOLS = (".dist-info", ".egg-info")


def is_here(source: str) -> bool:
    """Whether a source is a file or folder on this machine.

    Raises:
        InputError: If the name is empty, or the path cannot be accessed.
    """
    if not source.strip():
        raise InputError("a text source has an empty name; give a file, a folder or a hub dataset.")
    try:
        return Path(source).exists()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot access '{source}' ({reason_of(error)}); check the path.") from error


def find_files(path: Path, *, tell: bool = False) -> list[Path]:
    """The file itself, or the files of known formats below a folder, sorted.

    Links are followed. A file with several names (links) is listed once.

    Args:
        path: A file or folder.
        tell: Whether to log how many files of a folder are read and left out, if any are left out.

    Raises:
        InputError: If the format is unknown or the folder contains nothing that can be read.
    """
    if path.is_file():
        if format_of(path) is None:
            check_plain_text(path)
        return [path]
    if not path.is_dir():
        raise InputError(f"cannot read '{path}': it is neither a file nor a folder.")
    listing = _Listing(path)
    left_out = listing.told()
    if not listing.files:
        but = f" (left out: {left_out})" if left_out else ""
        raise InputError(
            f"the folder '{path}' holds no {', '.join(known_suffixes())} file{but}; check the path."
        )
    if tell and left_out:
        number = len(listing.files)
        logger.info("read %d file%s of '%s'; left out: %s", number, "s" * (number != 1), path, left_out)
    return listing.files


@dataclass
class _Listing:
    """The files below a folder that are read, and counts of those left out.

    Args:
        root: The folder.

    Raises:
        InputError: If the folder itself cannot be opened.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._seen: set[tuple[int, int | str]] = set()
        # Links come last, so that a file that is also found without a link keeps its own name.
        self._links = [self.root]
        for link in self._links:  # The list grows during the loop.
            self._walk(link)
        self.files.sort()

    def told(self) -> str:
        """What was left out, with counts, and the most frequent suffixes among other formats."""
        counts = {reason: str(count) for reason, count in sorted(self.left_out.items())}
        if self.suffixes:
            shown = self.suffixes.most_common(_SUFFIXES_TOLD)
            more = self.suffixes.total() - sum(count for _, count in shown)
            words = [f"{suffix} {count}" for suffix, count in shown] + [f"others {more}"] * bool(more)
            counts[_OTHERS] += f": {', '.join(words)}"
        return ", ".join(f"{reason} ({count})" for reason, count in counts.items())

    def _walk(self, start: Path) -> None:
        """Add a file, or everything below a folder, in order of names."""
        waiting = [start]
        while waiting:
            path = waiting.pop()
            if path is not start and path.is_symlink():
                self._links.append(path)
                continue
            try:
                status = path.stat()
                is_folder = stat.S_ISDIR(status.st_mode)
                names = sorted(os.listdir(path)) if is_folder else []  # noqa: PTH208 (names, not paths)
            except OSError as error:
                if path is self.root:
                    raise InputError(f"cannot open the folder '{path}' ({reason_of(error)}).") from error
                self.left_out["broken links" if path.is_symlink() else "unreadable"] += 1
                continue
            if path is not self.root and (reason := _reason_against(path, status, names)):
                self.left_out[reason] += 1
                if reason == _OTHERS:
                    self.suffixes[_suffix_of(path)] += 1
            elif (identity := _identity_of(path, status)) in self._seen:
                self.left_out["already read under another name"] += 1
            else:
                self._seen.add(identity)
                if not is_folder:
                    self.files.append(path)
                waiting += [path / name for name in reversed(names) if self._is_wanted(path / name)]

    def _is_wanted(self, path: Path) -> bool:
        """Whether a name below a folder is neither hidden nor one that a system or tool uses."""
        name = path.name.lower()
        if name in _OF_TOOLS or name.endswith(_ENDS_OF_TOOLS):
            self.left_out["of systems and tools"] += 1
        elif name.startswith((".", "~$")):
            if format_of(path) or path.is_dir():  # Other hidden files are not worth reporting.
                self.left_out["hidden"] += 1
        else:
            return True
        return False


def _identity_of(path: Path, status: os.stat_result) -> tuple[int, int | str]:
    """An identity that all names (links) of a file or folder share."""
    return status.st_dev, status.st_ino or str(path.resolve())  # Some file systems have no inode numbers.


def _reason_against(path: Path, status: os.stat_result, names: Collection[str]) -> str | None:
    """Why a file or folder with an ordinary name is left out; None if it is not."""
    if stat.S_ISDIR(status.st_mode):
        if "pyvenv.cfg" in names:
            return "of systems and tools"
        if _is_of_calm(path, names):
            return "runs, models and prepared text"
        return "saved datasets, which need to be named" if is_saved(path) else None
    return None if stat.S_ISREG(status.st_mode) and format_of(path) else _OTHERS


def _suffix_of(path: Path) -> str:
    """The suffix of a file, ignoring compression, if it is fit to be shown."""
    suffix = Path(name_without_compression(path)).suffix
    return suffix if suffix[1:].isalnum() and len(suffix) <= _LONGEST_SUFFIX else "without a suffix"


def _is_of_calm(path: Path, names: Collection[str]) -> bool:
    """Whether a folder is prepared text, a model with its tokenizer, or a run."""
    if "prepared.json" in names or "tokenizer_config.json" in names:
        return True
    parts = ("data/prepared.json", "checkpoints", "autoencoder/config.json", "model/config.json")
    return "recipe.yaml" in names and any((path / part).exists() for part in parts)
