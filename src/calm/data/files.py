"""The files of a source: a file itself, or all files of known formats below a folder, compressed or not.

Below a folder these are left out: other formats, hidden files and folders, those of systems and tools (trash,
caches, installed packages), what calm itself wrote (runs, prepared text, models), datasets written by
`save_to_disk`, broken links, folders that cannot be opened, and files already read under another name. A file
that the user names directly is always read, as plain text if its format is unknown.
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
_TOOL_FOLDERS = {
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
_OTHER_FORMATS = "other formats"
_MAX_SUFFIXES_SHOWN, _LONGEST_SUFFIX = 5, 12
_TOOL_SUFFIXES = (".dist-info", ".egg-info")


def is_local(source: str) -> bool:
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


def find_files(path: Path, *, log_excluded: bool = False) -> list[Path]:
    """The file itself, or the files of known formats below a folder, sorted.

    Links are followed. A file with several names (links) is listed once.

    Args:
        path: A file or folder.
        log_excluded: Whether to log how many files of a folder were read and left out, if any were left out.

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
    excluded = listing.summary()
    if not listing.files:
        details = f" (left out: {excluded})" if excluded else ""
        raise InputError(
            f"the folder '{path}' holds no {', '.join(known_suffixes())} file{details}; check the path."
        )
    if log_excluded and excluded:
        number = len(listing.files)
        logger.info("read %d file%s of '%s'; left out: %s", number, "s" * (number != 1), path, excluded)
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
    excluded: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._seen: set[tuple[int, int | str]] = set()
        # Links are followed last, so that a file also found without a link is listed under its own path.
        self._links = [self.root]
        for link in self._links:  # The list grows during the loop.
            self._walk(link)
        self.files.sort()

    def summary(self) -> str:
        """Counts of what was left out, by reason, with the most frequent suffixes of other formats."""
        counts = {reason: str(count) for reason, count in sorted(self.excluded.items())}
        if self.suffixes:
            shown = self.suffixes.most_common(_MAX_SUFFIXES_SHOWN)
            more = self.suffixes.total() - sum(count for _, count in shown)
            suffixes = [f"{suffix} {count}" for suffix, count in shown]
            if more:
                suffixes.append(f"others {more}")
            counts[_OTHER_FORMATS] += f": {', '.join(suffixes)}"
        return ", ".join(f"{reason} ({count})" for reason, count in counts.items())

    def _walk(self, start: Path) -> None:
        """Add a file, or everything below a folder, in the order of names."""
        stack = [start]
        while stack:
            path = stack.pop()
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
                self.excluded["broken links" if path.is_symlink() else "unreadable"] += 1
                continue
            if path is not self.root and (reason := _exclusion_reason(path, status, names)):
                self.excluded[reason] += 1
                if reason == _OTHER_FORMATS:
                    self.suffixes[_suffix_of(path)] += 1
            elif (identity := _identity_of(path, status)) in self._seen:
                self.excluded["already read under another name"] += 1
            else:
                self._seen.add(identity)
                if not is_folder:
                    self.files.append(path)
                stack += [path / name for name in reversed(names) if self._is_visible(path / name)]

    def _is_visible(self, path: Path) -> bool:
        """Whether a name below a folder is neither hidden nor that of a system or tool; counted if not."""
        name = path.name.lower()
        if name in _TOOL_FOLDERS or name.endswith(_TOOL_SUFFIXES):
            self.excluded["of systems and tools"] += 1
        elif name.startswith((".", "~$")):
            if format_of(path) or path.is_dir():  # Other hidden files are not worth reporting.
                self.excluded["hidden"] += 1
        else:
            return True
        return False


def _identity_of(path: Path, status: os.stat_result) -> tuple[int, int | str]:
    """An identity that is the same under every name (link) of a file or folder."""
    return status.st_dev, status.st_ino or str(path.resolve())  # Some file systems have no inode numbers.


def _exclusion_reason(path: Path, status: os.stat_result, names: Collection[str]) -> str | None:
    """Why a file or folder with an ordinary name is left out; None if it is to be read."""
    if stat.S_ISDIR(status.st_mode):
        if "pyvenv.cfg" in names:
            return "of systems and tools"
        if _is_calm_output(path, names):
            return "runs, models and prepared text"
        return "saved datasets, which need to be named" if is_saved(path) else None
    return None if stat.S_ISREG(status.st_mode) and format_of(path) else _OTHER_FORMATS


def _suffix_of(path: Path) -> str:
    """The suffix of a file for the log, ignoring compression; odd ones count as "without a suffix"."""
    suffix = Path(name_without_compression(path)).suffix
    return suffix if suffix[1:].isalnum() and len(suffix) <= _LONGEST_SUFFIX else "without a suffix"


def _is_calm_output(path: Path, names: Collection[str]) -> bool:
    """Whether a folder is prepared text, a model with its tokenizer, or a run."""
    if "prepared.json" in names or "tokenizer_config.json" in names:
        return True
    parts = ("data/prepared.json", "checkpoints", "autoencoder/config.json", "model/config.json")
    return "recipe.yaml" in names and any((path / part).exists() for part in parts)
