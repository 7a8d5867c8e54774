"""Files of no known format: read as plain text if that is what they contain."""

import codecs
from pathlib import Path

from calm.data.compression import COMPRESSIONS, name_without_compression, open_file
from calm.data.formats import known_suffixes
from calm.data.reading import DAMAGE
from calm.errors import InputError

_BYTES_CHECKED = 2**16
# Files of records are text too, but hardly anyone wants to train on their brackets and commas.
_RECORD_SUFFIXES = (".json", ".csv", ".tsv", ".arrow")


def check_plain_text(path: Path) -> None:
    """Check that a file of no known format can be read as plain text.

    Args:
        path: The file, compressed or not.

    Raises:
        InputError: If it does not start as UTF-8 text, or contains records in an unsupported format.
    """
    if name_without_compression(path).endswith(_RECORD_SUFFIXES):
        raise InputError(
            f"'{path}' holds records; convert it to .jsonl or .parquet first (datasets.load_dataset reads "
            "it, and to_json and to_parquet write them)."
        )
    try:
        with open_file(path) as file:
            beginning = file.read(_BYTES_CHECKED)
        is_complete = len(beginning) < _BYTES_CHECKED
        codecs.getincrementaldecoder("utf-8")().decode(beginning, is_complete)
    except (UnicodeDecodeError, *DAMAGE):
        beginning = b"\0"
    if b"\0" in beginning:
        raise InputError(
            f"cannot read '{path}': it is not UTF-8 plain text, and its name does not end in "
            f"{', '.join(known_suffixes())}, perhaps followed by {', '.join(COMPRESSIONS)}."
        )
