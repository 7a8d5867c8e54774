"""Models in GGUF files, local or on the hub: FOLDER/model.gguf, or owner/name/model.gguf.

This module imports neither torch nor transformers, because names are checked before those are imported.
"""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download

from calm.hub.connection import hub_or_cache

_SUFFIX = ".gguf"
_MIN_PARTS = 3  # owner/name/file.


class HubFile(NamedTuple):
    """A file on the hub.

    Args:
        repository: Its repository, owner/name.
        file: Its path there.
    """

    repository: str
    file: str


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file, local or on the hub."""
    return name.lower().endswith(_SUFFIX)


def as_hub_file(name: str) -> HubFile | None:
    """The hub file that a GGUF name refers to; None if it cannot be one on the hub."""
    parts = name.split("/")
    if not is_gguf(name) or len(parts) < _MIN_PARTS or not all(parts):
        return None
    return HubFile("/".join(parts[:2]), "/".join(parts[2:]))


def local_file(name: str) -> Path:
    """The local path of a GGUF file; one on the hub is downloaded if it is not in the cache.

    Raises:
        Exception: Any error of the hub's client, if there is no such file.
    """
    remote = as_hub_file(name)
    if Path(name).is_file() or remote is None:
        return Path(name)
    with hub_or_cache():
        return Path(hf_hub_download(remote.repository, remote.file))
