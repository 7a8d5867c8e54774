"""Files, folders and hub datasets -> documents, one string each.

`calm.data.formats` says which formats of files there are.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from calm.data.files import find_files, is_here
from calm.data.formats import format_of, read_documents
from calm.data.kept import made_or_kept
from calm.data.reading import ReadingOptions
from calm.errors import InputError, reason_of
from calm.hub.connection import hub_or_cache, may_be_on_hub

_BYTES_AT_ONCE = 2**28  # Of files, for each process.
_Stamp = tuple[str, int, int]  # Path, bytes, time of change.
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def load_documents(
    sources: list[str],
    options: ReadingOptions,
    *,
    cache_dir: str | None = None,
    num_proc: int = 1,
    most: int | None = None,
) -> datasets.Dataset:
    """All documents of the sources as a memory-mapped dataset with one column, `text`.

    Args:
        sources: Files, folders (searched for all known formats), or names of hub datasets
            ("owner/name" or "owner/name:config", the train split).
        options: How documents are found.
        cache_dir: Where the dataset is written; the cache of `datasets` when None.
        num_proc: Processes that read files at the same time.
        most: Documents of each file or hub dataset that are read at most.

    Raises:
        InputError: If a source is missing, empty, damaged or of an unknown format.
    """
    check_sources(sources)
    files: list[Path] = []
    parts: list[datasets.Dataset] = []
    for source in sources:
        if is_here(source):
            files += find_files(Path(source), tell=True)
        else:
            parts.append(_load_from_hub(source, options.text_field, most=most))
    if files:
        parts.append(_read_files(files, options, cache_dir, num_proc, most))
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Shard:
    """Documents that are read one after the other: a file, or a part of a hub dataset.

    Args:
        read: Gives its documents.
    """

    read: Callable[[], Iterator[str]]


def find_shards(sources: Sequence[str], options: ReadingOptions) -> list[Shard]:
    """What the sources consist of, without reading it.

    Args:
        sources: As for `load_documents`; hub datasets are read as they arrive, and not stored.
        options: How documents are found.

    Raises:
        InputError: If a source is missing or of an unknown format.
    """
    check_sources(sources)
    shards = []
    for source in sources:
        if is_here(source):
            files = find_files(Path(source))
            shards += [Shard(partial(read_documents, file, options)) for file in files]
        else:
            stream = _load_from_hub(source, options.text_field, streaming=True)
            parts = range(stream.num_shards)
            shards += [Shard(partial(_read_part, stream, part)) for part in parts]
    return shards


def check_sources(sources: Sequence[str]) -> None:
    """Find mistakes in the names of sources before any work is done; hub datasets are not asked for.

    Raises:
        InputError: If there are none, or one is missing or of an unknown format.
    """
    if not sources:
        raise InputError("there is no source of text; give a file, a folder or a hub dataset.")
    for source in sources:
        if is_here(source):
            find_files(Path(source))
        else:
            _check_hub_name(source)


def _read_files(
    files: list[Path], options: ReadingOptions, cache_dir: str | None, num_proc: int, most: int | None
) -> datasets.Dataset:
    if not any(True for file in files for _ in read_documents(file, options)):
        raise InputError(f"there is no text in {', '.join(map(str, files))}; give a source with text.")
    # Size and time are part of the arguments so that a changed file is not taken from the cache.
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    below = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "generator"
    groups = [
        made_or_kept(
            partial(_read_group, group, options, cache_dir, num_proc, most),
            below,
            "documents",
            has_folders=True,
        )
        for group in _groups(stamps, num_proc)
    ]
    return datasets.concatenate_datasets(groups)


def _groups(stamps: list[_Stamp], num_proc: int) -> Iterator[list[_Stamp]]:
    """Files that are read together: enough work for all processes, and not too much to lose."""
    group: list[_Stamp] = []
    for stamp in stamps:
        group.append(stamp)
        if sum(size for _, size, _ in group) >= num_proc * _BYTES_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _read_group(
    stamps: list[_Stamp], options: ReadingOptions, cache_dir: str | None, num_proc: int, most: int | None
) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_generator(
            _generate,
            features=datasets.Features({"text": datasets.Value("large_string")}),
            gen_kwargs={"stamps": stamps, "options": options, "most": most},
            cache_dir=cache_dir,
            num_proc=min(num_proc, len(stamps)) if num_proc > 1 and len(stamps) > 1 else None,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def _generate(stamps: list[_Stamp], options: ReadingOptions, most: int | None) -> Iterator[dict[str, str]]:
    for file, _, _ in stamps:
        for document in itertools.islice(read_documents(Path(file), options), most):
            yield {"text": document}


def _check_hub_name(source: str) -> None:
    name = source.partition(":")[0]
    if not _HUB_NAME.fullmatch(source) or format_of(Path(source)) is not None or not may_be_on_hub(name):
        raise InputError(f"there is no file or folder '{source}'; check the path.")


def _read_part(stream: datasets.IterableDataset, part: int) -> Iterator[str]:
    """Documents of one shard of a hub dataset, without those that are blank."""
    for row in stream.shard(num_shards=stream.num_shards, index=part):
        if _has_text(row):
            yield row["text"]


def _has_text(row: dict[str, str | None]) -> bool:
    return bool(row["text"] and row["text"].strip())


def _load_from_hub(source: str, text_field: str, streaming: bool = False, most: int | None = None) -> Any:
    """The train split of a hub dataset as the column `text`: whole, its beginning, or as it arrives."""
    if most is not None:
        try:
            first = _load_from_hub(source, text_field, streaming=True).filter(_has_text).take(most)
            return datasets.Dataset.from_list(
                list(first), datasets.Features({"text": datasets.Value("string")})
            )
        except InputError:
            raise
        except Exception as error:
            raise _not_given(source, error) from error
    dataset = load_hub_dataset(source, streaming)
    if text_field not in dataset.column_names:
        raise InputError(
            f"the dataset '{source}' has no column '{text_field}'; "
            f"its columns are {', '.join(dataset.column_names)}."
        )
    column = dataset.select_columns([text_field])
    return column if text_field == "text" else column.rename_column(text_field, "text")


def load_hub_dataset(source: str, streaming: bool = False) -> Any:
    """The train split of "owner/name" or "owner/name:config", whole or as it arrives.

    Raises:
        InputError: If it is no name, or the hub does not give it.
    """
    _check_hub_name(source)
    name, _, config = source.partition(":")
    try:
        with hub_or_cache():
            dataset = datasets.load_dataset(name, config or None, split="train", streaming=streaming)
            # A stream looks at its first record.
            return dataset._resolve_features() if dataset.column_names is None else dataset
    except Exception as error:
        raise _not_given(source, error) from error


def _not_given(source: str, error: Exception) -> InputError:
    return InputError(
        f"'{source}' is neither a file or folder here nor a dataset that the hub gave ({reason_of(error)})."
    )
