"""Sources -> documents, one string each, in a memory-mapped dataset.

`calm.data.formats` says which formats of files there are, `calm.data.rows` which datasets, and
`calm.data.shards` how either is parted.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute

from calm.data.counts import number
from calm.data.engines import Ahead, nothing_ahead
from calm.data.kept import made_or_kept
from calm.data.options import ReadingOptions
from calm.data.pieces import rank_of
from calm.data.rows import Source, name_of
from calm.data.shards import Shard, Use, check_sources, shards_of
from calm.errors import InputError

logger = logging.getLogger(__name__)
_BYTES_AT_ONCE = 2**28  # Of files, for each process.
# Raised whenever `_generate` gives other rows: they are kept by their arguments, not by its code.
_FORMAT_OF_ROWS = 1
_FEATURES = datasets.Features(
    {
        "text": datasets.Value("large_string"),
        "rank": datasets.Value("int64"),  # `datasets` cannot write one of 64 bits without a sign.
        "skipped": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class Documents:
    """The documents of sources.

    Args:
        texts: Column `text`, memory-mapped.
        ranks: Of each document (`calm.data.pieces.rank_of`).
        num_skipped: Records without text, which are no documents.
    """

    texts: datasets.Dataset
    ranks: np.ndarray
    num_skipped: int


def load_documents(
    sources: Sequence[Source],
    options: ReadingOptions,
    *,
    seed: int = 0,
    cache_dir: str | None = None,
    num_proc: int = 1,
    most: int | None = None,
    ahead: Ahead = nothing_ahead,
) -> Documents:
    """All documents of the sources, in their order. Records without text are skipped, and their number told.

    Args:
        sources: Files, folders (searched for all known formats, or written by `save_to_disk`), names of hub
            datasets ("owner/name" or "owner/name:config", the train split), or datasets of `datasets`.
        options: How documents are found.
        seed: Seed of the ranks.
        cache_dir: Where the documents are written; the cache of `datasets` when None.
        num_proc: Processes that read at the same time.
        most: Documents of each file, or part of a dataset, that are read at most.
        ahead: Where groups of files are read before they are needed (`calm.data.engines`).

    Raises:
        InputError: If a source is missing, empty, damaged or of an unknown format.
    """
    check_sources(sources)
    use: Use = "whole" if most is None else "sample"
    shards = [shard for source in sources for shard in shards_of(source, options, use, tell=True)]
    settings = json.dumps([_FORMAT_OF_ROWS, asdict(options), seed, most])
    groups = [
        partial(_read_group, group, settings, seed=seed, most=most, cache_dir=cache_dir, num_proc=num_proc)
        for group in _groups(shards, num_proc)
    ]
    ahead([group for group in groups if not group.args[0][0].is_in_memory])
    rows = datasets.concatenate_datasets([group() for group in groups])
    return _documents_of(rows, sources)


def _documents_of(rows: datasets.Dataset, sources: Sequence[Source]) -> Documents:
    """What rows of `_generate` tell."""
    texts, ranks = rows.data.column("text"), rows.data.column("rank").to_numpy().view(np.uint64)
    num_skipped = pyarrow.compute.sum(rows.data.column("skipped")).as_py()
    if texts.null_count:
        chosen = np.flatnonzero(texts.is_valid())
        rows, ranks = rows.select(chosen), ranks[chosen]
    if num_skipped:
        logger.info("text: skipped %s without text", number(num_skipped, "record"))
    if not len(rows):
        raise InputError(f"there is no text in {', '.join(map(name_of, sources))}; give a source with text.")
    return Documents(rows.select_columns(["text"]), ranks, num_skipped)


def _groups(shards: Iterable[Shard], num_proc: int) -> Iterator[list[Shard]]:
    """Shards that are read together: enough work for all processes, and not too much to lose."""
    group: list[Shard] = []
    num_bytes = 0
    for shard in shards:
        is_full = num_bytes >= num_proc * _BYTES_AT_ONCE
        if group and (is_full or shard.is_in_memory or group[0].is_in_memory):
            yield group
            group, num_bytes = [], 0
        group.append(shard)
        num_bytes += shard.num_bytes
    if group:
        yield group


def _read_group(
    group: list[Shard], settings: str, *, seed: int, most: int | None, cache_dir: str | None, num_proc: int
) -> datasets.Dataset:
    """The rows of shards, which are kept under a name made of all that they depend on."""
    stamps = [shard.stamp or uuid.uuid4().hex for shard in group]
    name = hashlib.blake2b(json.dumps([stamps, settings]).encode(), digest_size=12).hexdigest()
    below = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "generator"
    make = partial(
        datasets.Dataset.from_generator,
        _generate,
        features=_FEATURES,
        gen_kwargs={"shards": group, "seed": seed, "most": most},
        cache_dir=cache_dir,
        num_proc=min(num_proc, len(group)) if num_proc > 1 and len(group) > 1 else None,
        fingerprint=name,
    )
    try:
        # What others write beside it at the same time is their own.
        return made_or_kept(make, below / f"default-fingerprint={name}", "documents", has_folders=True)
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def _generate(shards: list[Shard], seed: int, most: int | None) -> Iterator[dict[str, Any]]:
    """A row for each document, which says how many records without text were skipped before it.

    There is at least one row, because `datasets` cannot open a file of none: the last one has no text where
    records were skipped at the end, or where there is no document at all.
    """
    skipped, is_empty = 0, True
    for shard in shards:
        left = most
        for text in shard.read():
            if text is None:
                skipped += 1
                continue
            rank = np.uint64(rank_of(text, seed)).view(np.int64)
            yield {"text": text, "rank": rank, "skipped": skipped}
            skipped, is_empty = 0, False
            left = left and left - 1
            if left == 0:
                break
    if skipped or is_empty:
        yield {"text": None, "rank": 0, "skipped": skipped}
