"""Streamed text -> endless blocks: read, tokenized and laid out during training.

Documents are read in windows. The documents of a window are shuffled and laid out in blocks together; the
order of files is reshuffled for each epoch. So a window depends only on the sources, the seed and where it
starts, and a stream resumes exactly where it stopped without storing what it has read.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from calm.core.random import seed_of
from calm.data.chunking import Layout, check_block_size, make_blocks
from calm.data.options import ReadingOptions
from calm.data.shards import Shard, find_shards
from calm.data.splitting import Split
from calm.errors import InputError
from calm.text.encoding import encode_documents

CURSOR = "cursor"  # Feature of a block: the arguments of `Position.record`.
_MAX_EMPTY_EPOCHS = 100
_FEATURES = ("input_ids", "labels", "position_ids")


class Cursor(NamedTuple):
    """Where a reader is: at a block of a window, which starts at a document of a shard.

    Args:
        epoch: How often all shards have been read.
        shard: Index in this epoch's order of the reader's shards.
        document: Index in the shard, counting held-out documents; each stretch of a document that is cut
            counts as one.
        window: Windows of this epoch before this one.
        block: Blocks of this window before this one.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0
    window: int = 0
    block: int = 0


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How text becomes a stream of blocks.

    Args:
        sources: Files, folders, or hub datasets.
        options: How to find documents in them.
        chunk_size: Tokens per chunk K.
        block_size: Tokens per block T.
        layout: How documents are aligned to chunks.
        seed: Seed of the order, and of the documents' offsets in their first chunks.
        window: Documents that are shuffled together.
        held_out_below: Documents whose rank (`calm.data.pieces.rank_of`) is at most this are held out; None
            holds out none.
        held_out_seed: Seed of those ranks.
        part_bytes: Longer documents are held out in parts of about this size; None never cuts a document
            (`calm.data.splitting`).
    """

    sources: Sequence[str]
    options: ReadingOptions
    chunk_size: int
    block_size: int
    layout: Layout = "documents"
    seed: int = 0
    window: int = 1000
    held_out_below: int | None = None
    held_out_seed: int = 0
    part_bytes: int | None = None


@dataclass
class Position:
    """How far a process has read.

    Args:
        num_processes: Processes of the run.
        num_workers: Workers per process that read.
        next_worker: The worker that delivers the next batch.
        cursors: Where each worker resumes; "places" in the saved file.
        skipped: Records without text that each worker skipped in the first epoch.
    """

    num_processes: int
    num_workers: int
    next_worker: int = 0
    cursors: dict[int, Cursor] = field(default_factory=dict)
    skipped: dict[int, int] = field(default_factory=dict)

    def record(self, worker: int, *cursor_and_skipped: int) -> None:
        """Record that a worker's batch has been used: where it resumes, and the records it has skipped."""
        *cursor, skipped = cursor_and_skipped
        self.cursors[worker], self.skipped[worker] = Cursor(*cursor), skipped
        self.next_worker = (worker + 1) % self.num_workers

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        saved = {
            "num_processes": self.num_processes,
            "num_workers": self.num_workers,
            "next_worker": self.next_worker,
            "places": self.cursors,
            "skipped": self.skipped,
        }
        path.write_text(json.dumps(saved) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Load a saved position.

        Raises:
            InputError: If there is none, or the text was divided among another number of readers.
        """
        if not path.is_file():
            raise InputError(
                f"there is no '{path}': streamed text must resume with the same number of processes."
            )
        saved = json.loads(path.read_text(encoding="utf-8"))
        if (saved["num_processes"], saved["num_workers"]) != (self.num_processes, self.num_workers):
            raise InputError(
                f"streamed text was read by {saved['num_processes']} process(es) with {saved['num_workers']} "
                f"worker(s) each and must resume with as many, not {self.num_processes} with "
                f"{self.num_workers}."
            )
        self.next_worker = saved["next_worker"]
        self.cursors = {int(worker): Cursor(*cursor) for worker, cursor in saved["places"].items()}
        self.skipped = {int(worker): count for worker, count in saved.get("skipped", {}).items()}


@dataclass
class _Skipped:
    """Counts the records without text that a reader skips.

    Args:
        number: The count so far.
        is_counting: Whether further records count: only in the first epoch, and not while a resumed run
            reads a window a second time.
    """

    number: int
    is_counting: bool

    def count(self, texts: Iterable[str | None]) -> Iterator[str]:
        """Yield the texts, and count the records without one."""
        for text in texts:
            if text is not None:
                yield text
            elif self.is_counting:
                self.number += 1


class BlockStream(IterableDataset):
    """Endless blocks with the features of `calm.data.chunking` that training needs, and `CURSOR`.

    The readers are the workers of all processes. If there are at least as many shards as readers, each reads
    its own shards; otherwise all read everything and take turns at laying out windows.

    Args:
        settings: How text becomes blocks.
        tokenizer: The tokenizer.
        position: Where to start; training records its progress there.
        process: Index of this process.

    Raises:
        InputError: If a source is missing or of an unknown format.
    """

    def __init__(
        self,
        settings: StreamSettings,
        tokenizer: PreTrainedTokenizerBase,
        position: Position,
        process: int = 0,
    ) -> None:
        check_block_size(settings.block_size, settings.chunk_size)
        self.settings, self.position = settings, position
        self._tokenizer, self._process = tokenizer, process
        self._shards = find_shards(settings.sources, settings.options)
        self._split = Split(settings.held_out_seed, settings.held_out_below, settings.part_bytes)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield blocks, starting at the position."""
        info = get_worker_info()
        worker_id, workers = (info.id, info.num_workers) if info else (0, 1)
        # torch always takes the first batch from worker 0, so workers are renumbered.
        worker = (worker_id + self.position.next_worker) % workers
        reader = self._process * workers + worker
        return self._read(reader, self.position.num_processes * workers, worker)

    def num_skipped(self) -> int:
        """Records without text that this process has skipped, each counted once."""
        counts = self.position.skipped.values()
        return sum(counts) if self.has_own_shards else max(counts, default=0)

    @property
    def has_own_shards(self) -> bool:
        """Whether each reader has its own shards."""
        return len(self._shards) >= self.position.num_processes * self.position.num_workers

    def _read(self, reader: int, readers: int, worker: int) -> Iterator[dict[str, Tensor]]:
        start, num_empty = self.position.cursors.get(worker, Cursor()), 0
        skipped = _Skipped(self.position.skipped.get(worker, 0), is_counting=start == Cursor())
        for epoch in itertools.count(start.epoch):
            shards = [self._shards[i] for i in self._generator(epoch).permutation(len(self._shards))]
            own_shards = self.has_own_shards
            windows = self._windows(shards[reader::readers] if own_shards else shards, start, skipped)
            has_text = start != Cursor(epoch)  # The rest of an epoch resumed midway may be empty.
            for cursor, documents in windows:
                skipped.is_counting = epoch == 0
                if not own_shards and cursor.window % readers != reader:
                    continue
                has_text = True
                blocks = self._lay_out(cursor, documents)
                first = start.block if cursor == start._replace(block=0) else 0
                for number in range(first, len(blocks["input_ids"])):
                    block = {name: torch.from_numpy(blocks[name][number]) for name in _FEATURES}
                    after = cursor._replace(block=number + 1)
                    yield block | {CURSOR: torch.tensor([worker, *after, skipped.number])}
            skipped.is_counting = False
            num_empty = 0 if has_text else num_empty + 1
            # A reader whose files had no text gets other files in the next epoch.
            if num_empty > (_MAX_EMPTY_EPOCHS if own_shards and len(shards) > 1 else 0):
                raise InputError(
                    f"one of {readers} readers finds no text in {', '.join(self.settings.sources)}; give "
                    "more text, fewer processes or workers, or smaller windows than "
                    f"{self.settings.window} documents."
                )
            start = Cursor(epoch + 1)

    def _windows(
        self, shards: list[Shard], start: Cursor, skipped: _Skipped
    ) -> Iterator[tuple[Cursor, list[str]]]:
        """Yield windows of documents, each with the cursor at its start."""
        cursor, documents = start._replace(block=0), list[str]()
        for number in range(start.shard, len(shards)):
            texts = skipped.count(shards[number].read())
            runs = (run for text in texts for run in self._split.runs(text))
            for index, (is_held_out, text) in enumerate(runs):
                if is_held_out or (number == start.shard and index < start.document):
                    continue
                if not documents:
                    cursor = cursor._replace(shard=number, document=index)
                documents.append(text)
                if len(documents) == self.settings.window:
                    yield cursor, documents
                    cursor, documents = cursor._replace(window=cursor.window + 1), []
        if documents:
            yield cursor, documents

    def _lay_out(self, cursor: Cursor, documents: list[str]) -> dict[str, np.ndarray]:
        settings = self.settings
        # If readers have their own shards, two windows may have the same cursor; the text tells them apart.
        seed = seed_of(settings.seed, *cursor, documents[0])
        order = np.random.default_rng(seed).permutation(len(documents))
        return make_blocks(
            encode_documents(self._tokenizer, [documents[i] for i in order]),
            list(range(len(documents))),
            chunk_size=settings.chunk_size,
            block_size=settings.block_size,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
            layout=settings.layout,
            seed=seed,
        )

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng(seed_of(self.settings.seed, epoch))
