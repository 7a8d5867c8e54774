"""Sources -> documents: one string each, in a memory-mapped dataset.

`calm.data.formats` defines the file formats, `calm.data.rows` the kinds of datasets, and `calm.data.shards`
how both are divided into shards.
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

from calm.data.caching import load_or_make
from calm.data.counts import pluralize
from calm.data.engines import RunAhead, run_none
from calm.data.options import ReadingOptions
from calm.data.pieces import rank_of
from calm.data.rows import Source, name_of
from calm.data.shards import Shard, Use, check_sources, shards_of
from calm.errors import InputError

logger = logging.getLogger(__name__)
_GROUP_BYTES_PER_PROCESS = 2**28
# Increment whenever `_generate` yields different rows: the cache depends on its arguments, not its code.
_ROWS_VERSION = 1
_FEATURES = datasets.Features(
    {
        "text": datasets.Value("large_string"),
        "rank": datasets.Value("int64"),  # `datasets` cannot write uint64.
        "skipped": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class Documents:
    """The documents of sources.

    Args:
        texts: Column `text`, memory-mapped.
        ranks: Rank of each document (`calm.data.pieces.rank_of`).
        num_skipped: Number of records without text, which are not documents.
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
    max_documents: int | None = None,
    run_ahead: RunAhead = run_none,
) -> Documents:
    """Load all documents of the sources, in order. Records without text are skipped and counted.

    Args:
        sources: Files, folders (searched for all known formats, or written by `save_to_disk`), names of hub
            datasets ("owner/name" or "owner/name:config", the train split), or datasets of `datasets`.
        options: How to find documents.
        seed: Seed of the ranks.
        cache_dir: Where the documents are written; None for the cache of `datasets`.
        num_proc: Processes that read in parallel.
        max_documents: Maximum number of documents read from each file or dataset; None reads all.
        run_ahead: Reads groups of files before they are needed (`calm.data.engines`).

    Raises:
        InputError: If a source is missing, empty, damaged or of an unknown format.
    """
    check_sources(sources)
    use: Use = "whole" if max_documents is None else "sample"
    shards = [shard for source in sources for shard in shards_of(source, options, use, log_excluded=True)]
    settings = json.dumps([_ROWS_VERSION, asdict(options), seed, max_documents])
    groups = [
        partial(
            _read_group,
            group,
            settings,
            seed=seed,
            max_documents=max_documents,
            cache_dir=cache_dir,
            num_proc=num_proc,
        )
        for group in _groups(shards, num_proc)
    ]
    run_ahead([group for group in groups if not group.args[0][0].is_in_memory])
    rows = datasets.concatenate_datasets([group() for group in groups])
    return _to_documents(rows, sources)


def _to_documents(rows: datasets.Dataset, sources: Sequence[Source]) -> Documents:
    """Turn the rows of `_generate` into documents, and log how many records were skipped."""
    texts, ranks = rows.data.column("text"), rows.data.column("rank").to_numpy().view(np.uint64)
    num_skipped = pyarrow.compute.sum(rows.data.column("skipped")).as_py()
    if texts.null_count:
        with_text = np.flatnonzero(texts.is_valid())
        rows, ranks = rows.select(with_text), ranks[with_text]
    if num_skipped:
        logger.info("text: skipped %s without text", pluralize(num_skipped, "record"))
    if not len(rows):
        raise InputError(f"there is no text in {', '.join(map(name_of, sources))}; give a source with text.")
    return Documents(rows.select_columns(["text"]), ranks, num_skipped)


def _groups(shards: Iterable[Shard], num_proc: int) -> Iterator[list[Shard]]:
    """Group shards to be read together: enough for all processes, but not too much to lose in a crash."""
    group: list[Shard] = []
    num_bytes = 0
    for shard in shards:
        is_full = num_bytes >= num_proc * _GROUP_BYTES_PER_PROCESS
        if group and (is_full or shard.is_in_memory or group[0].is_in_memory):
            yield group
            group, num_bytes = [], 0
        group.append(shard)
        num_bytes += shard.num_bytes
    if group:
        yield group


def _read_group(
    group: list[Shard],
    settings: str,
    *,
    seed: int,
    max_documents: int | None,
    cache_dir: str | None,
    num_proc: int,
) -> datasets.Dataset:
    """Read the rows of shards, cached under a digest of everything that they depend on."""
    versions = [shard.stamp or uuid.uuid4().hex for shard in group]
    name = hashlib.blake2b(json.dumps([versions, settings]).encode(), digest_size=12).hexdigest()
    generator_cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "generator"
    make = partial(
        datasets.Dataset.from_generator,
        _generate,
        features=_FEATURES,
        gen_kwargs={"shards": group, "seed": seed, "max_documents": max_documents},
        cache_dir=cache_dir,
        num_proc=min(num_proc, len(group)) if num_proc > 1 and len(group) > 1 else None,
        fingerprint=name,
    )
    try:
        # Check only this group's folder: other processes may be writing next to it.
        return load_or_make(
            make, generator_cache / f"default-fingerprint={name}", "documents", has_folders=True
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def _generate(shards: list[Shard], seed: int, max_documents: int | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each document, with the number of records without text skipped just before it.

    There is at least one row, because `datasets` cannot open a file without rows. If records were skipped at
    the end, or there are no documents, the last row has no text.
    """
    skipped, is_empty = 0, True
    for shard in shards:
        num_documents = 0
        for text in shard.read():
            if text is None:
                skipped += 1
                continue
            rank = np.uint64(rank_of(text, seed)).view(np.int64)
            yield {"text": text, "rank": rank, "skipped": skipped}
            skipped, is_empty = 0, False
            num_documents += 1
            if max_documents is not None and num_documents >= max_documents:
                break
    if skipped or is_empty:
        yield {"text": None, "rank": 0, "skipped": skipped}
