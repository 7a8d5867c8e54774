"""Datasets of the `datasets` library: in memory, in folders of `save_to_disk`, and on the hub.

The split `train` is read. The split `validation` of a `DatasetDict`, in memory or saved, is held-out text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow

from calm.data.formats import format_of
from calm.data.options import ReadingOptions, is_text, no_such_field, text_of
from calm.errors import InputError, reason_of
from calm.hub.connection import hub_or_cache, may_be_on_hub
from calm.storage.disk import read_json

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
Splits: TypeAlias = datasets.DatasetDict | datasets.IterableDatasetDict
Source: TypeAlias = str | Path | Rows | Splits
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_DATASET_FILES, _SPLITS_FILE = ("state.json", "dataset_info.json"), "dataset_dict.json"
_TRAIN, _VALIDATION = "train", "validation"


def as_sources(sources: Source | Sequence[Source]) -> list[Source]:
    """One or several sources as a list: names as strings, datasets as they are.

    Raises:
        InputError: If a source is neither.
    """
    listed = list(sources) if isinstance(sources, list | tuple) else [sources]
    for source in listed:
        if not isinstance(source, Source):
            raise InputError(
                "a source must be a name or a dataset of the library `datasets`, not "
                f"{type(source).__name__}; turn texts into one with datasets.Dataset.from_dict({{'text': "
                "texts})."
            )
    return [str(source) if isinstance(source, Path) else source for source in listed]


def name_of(source: Source) -> str:
    """The name of a source, for messages and for `prepared.json`."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, datasets.Dataset):
        return f"a Dataset of {len(source)} rows"
    return f"a {type(source).__name__}"


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / _SPLITS_FILE).is_file() or all((path / name).is_file() for name in _DATASET_FILES)


def files_of_saved(path: Path) -> list[Path]:
    """The files that `train_rows` reads from a folder of `save_to_disk`."""
    folder = path / _TRAIN if (path / _SPLITS_FILE).is_file() else path
    return sorted(file for file in folder.iterdir() if file.suffix in (".arrow", ".json"))


def train_rows(source: str | Rows | Splits) -> Rows:
    """The rows of a dataset in memory or a folder of `save_to_disk`; of its split `train` if it has splits.

    Raises:
        InputError: If it has splits but no `train`, or the folder is damaged.
    """
    dataset = _load_saved(Path(source)) if isinstance(source, str) else source
    if isinstance(dataset, Rows):
        return dataset.with_format(None)
    if _TRAIN not in dataset:
        raise InputError(
            f"{quoted(source)} has no split '{_TRAIN}'; its splits are {', '.join(map(str, dataset))}. "
            "Give one of them."
        )
    return dataset[_TRAIN].with_format(None)


def validation_rows(sources: Iterable[Source]) -> list[Source]:
    """The `validation` splits of those sources that have one."""
    held_out: list[Source] = []
    for source in sources:
        if isinstance(source, Splits) and _VALIDATION in source:
            held_out.append(source[_VALIDATION])
        elif isinstance(source, str) and (Path(source) / _SPLITS_FILE).is_file():
            folder = Path(source) / _VALIDATION
            if is_saved(folder):
                held_out.append(str(folder))
    return held_out


def load_hub_dataset(source: str, streaming: bool = False) -> Any:
    """Load or stream the train split of "owner/name" or "owner/name:config".

    Raises:
        InputError: If it is not a hub name, or the hub does not return the dataset.
    """
    check_hub_name(source)
    name, _, config = source.partition(":")
    try:
        with hub_or_cache():
            dataset = datasets.load_dataset(name, config or None, split=_TRAIN, streaming=streaming)
            # A stream without column names infers them from its first records.
            return dataset._resolve_features() if dataset.column_names is None else dataset
    except Exception as error:
        raise no_such_dataset(source, error) from error


def check_hub_name(source: str) -> None:
    """Raise InputError if a source that is not on this machine cannot be a hub dataset either."""
    name = source.partition(":")[0]
    if not _HUB_NAME.fullmatch(source) or format_of(Path(source)) is not None or not may_be_on_hub(name):
        raise InputError(f"there is no file or folder '{source}'; check the path.")


def no_such_dataset(source: str, error: Exception) -> InputError:
    """The error for a name that the hub does not know, or a hub that does not answer."""
    return InputError(
        f"'{source}' is neither a local file or folder nor a dataset on the hub ({reason_of(error)})."
    )


def select_text_fields(rows: Rows, options: ReadingOptions, source: Source) -> Rows:
    """Drop all columns except the text fields.

    Raises:
        InputError: If such a field is missing, or is not text.
    """
    names = rows.column_names
    if names is None:  # A stream without known columns; each record is checked as it is read.
        return rows
    for name in options.text_fields:
        if name not in names:
            raise no_such_field(quoted(source), name, names)
        if rows.features is not None and not is_text(column := _type_of(rows.features[name])):
            raise InputError(f"the field '{name}' of {quoted(source)} is {column}, not text; name another.")
    return rows.select_columns(list(options.text_fields))


def texts_of(
    rows: Iterable[dict[str, Any]], options: ReadingOptions, where: str, first: int = 0
) -> Iterator[str | None]:
    """Yield the text of each row; None for a row without text.

    Args:
        rows: The rows.
        options: Which fields contain the text.
        where: The dataset, as named in messages.
        first: Number of the first row, for messages.

    Raises:
        InputError: If a text is too long or not a string, or a field is in no row.
    """
    missing, fields = list(options.text_fields), list[str]()
    for number, row in enumerate(rows, first):
        fields = fields or list(row)
        missing = [name for name in missing if name not in row]
        yield text_of(row, options, f"{where}, row {number}")
    if missing and fields:
        raise no_such_field(where, missing[0], fields)


def quoted(source: Source) -> str:
    """A source, as shown in a message."""
    return f"'{source}'" if isinstance(source, str) else name_of(source)


def _load_saved(path: Path) -> Rows | Splits:
    try:
        _check_names(path)
        return datasets.load_from_disk(str(path))
    except InputError:
        raise
    except Exception as error:  # Damaged files can raise anything.
        raise InputError(
            f"cannot read '{path}': the saved dataset is damaged ({reason_of(error)})."
        ) from error


def _check_names(path: Path) -> None:
    """Raise InputError if a saved dataset names files that are not in its folder."""
    folders: list[Path] = []
    if (path / _SPLITS_FILE).is_file():
        names = read_json(path / _SPLITS_FILE, dict)["splits"]
        folders = [path / name for name in names if is_saved(path / name)]
    else:
        names = [file["filename"] for file in read_json(path / _DATASET_FILES[0], dict)["_data_files"]]
    if outside := [name for name in names if name != Path(name).name]:
        raise InputError(f"'{path}' names a file outside its folder ({outside[0]!r}); it is not read.")
    for folder in folders:
        _check_names(folder)


def _type_of(feature: Any) -> pyarrow.DataType:
    return datasets.Features({"text": feature}).arrow_schema.field("text").type
