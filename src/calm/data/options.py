"""Options that say what a document is in a file or dataset, and the text of a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow

from calm.errors import InputError

_MAX_FIELDS_SHOWN, _MAX_NAME_LENGTH = 10, 40  # In error messages.
_FIELD_SEPARATOR = "\n\n"


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """What a document is in a file or dataset.

    Args:
        text_field: Field with the text of a record (JSON Lines, Parquet files, datasets). Several, as a
            sequence or separated by commas, are joined with a blank line between them.
        separator: A line that separates the documents of a plain-text file ("" for a blank line); None if
            each file is one document.
        max_document_mb: Maximum size of a document or line, and of a compressed Parquet file after
            decompression, in MB (10^6 bytes): each of these has to fit in memory.

    Raises:
        InputError: If `text_field` names no field, or the same field twice.
    """

    text_field: str | Sequence[str] = "text"
    separator: str | None = None
    max_document_mb: int = 1000

    def __post_init__(self) -> None:
        names = self.text_fields
        if not names or not all(names) or len(set(names)) < len(names):
            raise InputError(
                f"text_field must name one field, or several such as title,text; got {self.text_field!r}."
            )

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The text fields, in order."""
        if isinstance(self.text_field, str):
            return tuple(name.strip() for name in self.text_field.split(","))
        return tuple(self.text_field)

    @property
    def most_bytes(self) -> int:
        """Maximum bytes of a document."""
        return self.max_document_mb * 10**6


def text_of(record: Mapping[str, Any], options: ReadingOptions, where: str) -> str | None:
    """The text of a record: its text fields that are not blank, joined by blank lines; None if all are blank.

    Args:
        record: Field -> value.
        options: Which fields contain the text, and how long it may be.
        where: Location of the record, for messages.

    Raises:
        InputError: If a field is not text, or the text is too long or cannot be encoded as UTF-8.
    """
    values = []
    for name in options.text_fields:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise InputError(
                f"{where}, has {_describe_type(value)} in its field '{name}', not text; fix it, or name "
                "another field with --text_field (in a recipe: data.text_field)."
            )
        if value and value.strip():
            values.append(value)
    text = _FIELD_SEPARATOR.join(values)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InputError(f"{where}, has an unpaired surrogate in its text; fix it.") from None
    if size > options.most_bytes:
        raise too_long(f"the text of {where},", options.most_bytes)
    return text or None


def _describe_type(value: Any) -> str:
    descriptions = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return descriptions.get(type(value), f"a value of type {type(value).__name__}")


def no_such_field(container: str, missing: str, fields: Sequence[str]) -> InputError:
    """The error for a field that no record has.

    Args:
        container: The file or dataset with the records, as named in the message.
        missing: The missing field.
        fields: The fields that exist.
    """
    shown = [" ".join(name.split())[:_MAX_NAME_LENGTH] for name in fields[:_MAX_FIELDS_SHOWN]]
    more = ", ..." if len(fields) > _MAX_FIELDS_SHOWN else ""
    return InputError(
        f"{container} has no field '{missing}'; its fields are {', '.join(shown)}{more}. Name another with "
        "--text_field (in a recipe: data.text_field)."
    )


def is_text(column: pyarrow.DataType) -> bool:
    """Whether a column contains text, or only nulls."""
    types = pyarrow.types
    return types.is_string(column) or types.is_large_string(column) or types.is_null(column)


def too_long(subject: str, most_bytes: int, remedy: str = "split it") -> InputError:
    """The error for a text that is longer than `max_document_mb` allows."""
    return InputError(
        f"{subject} is longer than {most_bytes // 10**6} MB; {remedy}, or raise --max_document_mb (in a "
        "recipe: data.max_document_mb)."
    )
