"""Which text is held out: whole documents, or parts of long ones if whole documents are too coarse.

Documents and parts have ranks, 64-bit numbers that depend only on their text and the seed, and those with the
lowest ranks are held out. So the side of a document read later, from a stream, is known without a list of all
documents, and equal documents are on the same side.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute

from calm.data.counts import pluralize
from calm.data.cutting import longest_part, parts_of
from calm.data.pieces import rank_of, ranks_of
from calm.errors import InputError

logger = logging.getLogger(__name__)
_TOLERANCE = 0.25  # Relative deviation from the share asked for, up to which documents stay whole.
_PARTS_HELD_OUT = 6  # Approximate number, if parts of long documents are held out.
_SHORT_DOCUMENT = 1000  # Bytes up to which a document, unless it is the only one, stays whole.
_MIN_PARTS = 50  # Of a single document that is cut.
_DOCUMENTS_AT_ONCE = 100  # They may be long.


@dataclass(frozen=True)
class Split:
    """Tells training text from held-out text.

    Args:
        seed: Seed of the ranks.
        highest: The highest rank that is held out; None if nothing is.
        part_bytes: Documents longer than this are cut into parts of about this size; None never cuts one.
    """

    seed: int = 0
    highest: int | None = None
    part_bytes: int | None = None

    def runs(self, text: str) -> Iterator[tuple[bool, str]]:
        """Yield whether a document is held out, and its text; one that is cut is yielded in stretches."""
        if self.part_bytes is None:
            yield self._is_held_out(text), text
            return
        for is_held_out, run in itertools.groupby(parts_of(text, self.part_bytes), self._is_held_out):
            yield is_held_out, "".join(run)

    def _is_held_out(self, text: str) -> bool:
        if self.highest is None or rank_of(text, self.seed) > self.highest:
            return False
        # A part that could not be cut small enough would hold out more than was asked for.
        return self.part_bytes is None or len(text.encode()) <= longest_part(self.part_bytes)


def choose_split(
    documents: datasets.Dataset, ranks: np.ndarray, fraction: float, seed: int, sources: list[str]
) -> Split:
    """Choose the split that holds out a share of the text.

    It holds out that share of the documents, lowest ranks first, if this gives nearly that share of the text
    or if no document is long. Otherwise long documents are cut into parts, and documents and parts are held
    out until the share is reached; whichever of the two splits comes closer to the share is taken.

    Args:
        documents: Documents with the column `text`.
        ranks: Rank of each document.
        fraction: Share to hold out, above 0 and below 1.
        seed: Seed of the ranks.
        sources: Where the documents come from, for the message.

    Raises:
        InputError: If there is only one document, and it is a single paragraph.
    """
    sizes = _measure_documents(documents)
    by_documents = _split_by_documents(ranks, sizes, fraction, seed)
    size = _part_bytes(int(sizes.sum()), fraction, is_single=by_documents is None)
    if by_documents is not None and (
        abs(by_documents[1] - fraction) <= _TOLERANCE * fraction or sizes.max() <= size
    ):
        return by_documents[0]
    part_ranks, part_sizes = _measure_parts(documents, ranks, sizes, size, seed)
    while 2 * part_sizes[part_sizes <= longest_part(size)].sum() < sizes.sum():
        size *= 2  # Most paragraphs are longer than a part.
        part_ranks, part_sizes = _measure_parts(documents, ranks, sizes, size, seed)
    by_parts = _split_by_parts(part_ranks, part_sizes, fraction, seed, size)
    choices = [choice for choice in (by_documents, by_parts) if choice is not None]
    if not choices:
        raise InputError(
            f"{', '.join(sources)} holds a single document without two different paragraphs or lines, which "
            "cannot be split into training and held-out text; give more text, pass --separator to split it, "
            "or --validation with other text."
        )
    split, _ = min(choices, key=lambda choice: abs(choice[1] - fraction))
    if split.part_bytes is not None:
        logger.info(
            "text: cut %s (between paragraphs, if there are any) so that part of the text can be held out",
            pluralize((sizes > size).sum(), "long document"),
        )
    return split


def split_documents(
    documents: datasets.Dataset, ranks: np.ndarray, split: Split, work: Path
) -> dict[str, tuple[datasets.Dataset, np.ndarray]]:
    """Split into training and held-out documents, in order, each with their ranks.

    Args:
        documents: Documents with the column `text`.
        ranks: Rank of each document.
        split: The split.
        work: Folder for the text of documents that are cut.
    """
    if split.part_bytes is None:
        is_held_out = ranks <= np.uint64(split.highest or 0)
    else:
        documents = documents.map(
            partial(_runs_of_batch, split=split),
            batched=True,
            batch_size=_DOCUMENTS_AT_ONCE,
            writer_batch_size=_DOCUMENTS_AT_ONCE,
            remove_columns=documents.column_names,
            features=datasets.Features(
                {"text": datasets.Value("large_string"), "is_held_out": datasets.Value("bool")}
            ),
            cache_file_name=str(work / "runs.arrow"),
            load_from_cache_file=False,
            desc="cutting long documents",
        )
        is_held_out = np.array(documents.select_columns("is_held_out").with_format("numpy")[:]["is_held_out"])
        documents = documents.select_columns("text")
        ranks = ranks_of(documents, split.seed)
    return {
        name: (documents.select(np.flatnonzero(chosen)), ranks[chosen])
        for name, chosen in (("train", ~is_held_out), ("validation", is_held_out))
    }


def _runs_of_batch(batch: dict[str, list[str]], *, split: Split) -> dict[str, list]:
    runs = [run for text in batch["text"] for run in split.runs(text)]
    return {"text": [text for _, text in runs], "is_held_out": [is_held_out for is_held_out, _ in runs]}


def _measure_documents(documents: datasets.Dataset) -> np.ndarray:
    tables = documents.with_format("arrow").iter(1000)
    lengths = [pyarrow.compute.binary_length(table["text"]).to_numpy() for table in tables]
    return np.concatenate(lengths).astype(np.int64)


def _part_bytes(total: int, fraction: float, *, is_single: bool) -> int:
    """Bytes per part of long documents, such that about six parts make up the smaller side of the split."""
    minimum = min(_SHORT_DOCUMENT, total // _MIN_PARTS) if is_single else _SHORT_DOCUMENT
    return max(1, minimum, int(min(fraction, 1 - fraction) * total) // _PARTS_HELD_OUT)


def _split_by_documents(
    ranks: np.ndarray, sizes: np.ndarray, fraction: float, seed: int
) -> tuple[Split, float] | None:
    """The split that holds out this share of the distinct documents, and the share of the text it gets."""
    distinct = np.unique(ranks)
    if len(distinct) < 2:
        return None
    held_out = max(1, min(len(distinct) - 1, round(fraction * len(distinct))))
    highest = distinct[held_out - 1]
    return Split(seed, int(highest)), float(sizes[ranks <= highest].sum() / sizes.sum())


def _measure_parts(
    documents: datasets.Dataset, ranks: np.ndarray, sizes: np.ndarray, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and bytes of short documents, and of the parts of long ones."""
    is_long = sizes > size
    part_ranks, part_sizes = [ranks[~is_long]], [sizes[~is_long]]
    for row in documents.select(np.flatnonzero(is_long)):
        parts = parts_of(row["text"], size)
        part_ranks.append(np.array([rank_of(part, seed) for part in parts], np.uint64))
        part_sizes.append(np.array([len(part.encode()) for part in parts], np.int64))
    return np.concatenate(part_ranks), np.concatenate(part_sizes)


def _split_by_parts(
    ranks: np.ndarray, sizes: np.ndarray, fraction: float, seed: int, size: int
) -> tuple[Split, float] | None:
    """The split whose held-out documents and parts come closest to a share of the text, and their share."""
    is_short = sizes <= longest_part(size)
    distinct, inverse = np.unique(ranks[is_short], return_inverse=True)
    num_candidates = len(distinct) - bool(is_short.all())  # Leaves something to train on.
    if num_candidates < 1:
        return None
    shares = np.cumsum(np.bincount(inverse, sizes[is_short]))[:num_candidates] / sizes.sum()
    last = int(np.argmin(np.abs(shares - fraction)))
    return Split(seed, int(distinct[last]), size), float(shares[last])
