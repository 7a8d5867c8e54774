"""Compressed files: their suffixes, and how to open them."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pyarrow


def _open_zstandard(path: Path) -> IO[bytes]:
    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream)


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
    ".bz2": bz2.open,
}


def name_without_compression(path: Path) -> str:
    """The name of a file in lower case, without its compression suffix."""
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return name


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading bytes; a compressed file is decompressed on the fly."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb")
