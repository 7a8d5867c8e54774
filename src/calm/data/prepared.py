"""A prepared folder, open for reading: tokenizer, documents, and the blocks built from them.

folder/
  train/ validation/   datasets with one column, `input_ids`: the tokens of a document, without EOS
  tokenizer/           a tokenizer folder of transformers
  prepared.json        what was prepared, from what
  checksums.json       of all these files
  blocks/              a cache of the blocks built from the documents
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from calm.core.seeds import as_seed
from calm.data.caching import load_or_make
from calm.data.chunking import Layout, check_block_size, make_blocks
from calm.data.counts import Counts, count
from calm.data.options import ReadingOptions
from calm.data.pieces import tokenize
from calm.data.rows import validation_rows
from calm.data.sources import load_documents
from calm.data.splitting import Split
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError, reason_of
from calm.storage.checksums import CHECKSUMS, find_damage
from calm.storage.disk import read_json
from calm.storage.folders import temporary_folder
from calm.text.vocabulary import num_ids

logger = logging.getLogger(__name__)
INFO = "prepared.json"
_BEGINNING_WORDS = 24
_BEGINNING_CHARACTERS = 240  # At most: not all text has spaces between its words.
_NUM_FREQUENT = 500  # Tokens that are counted as neighbours.
_MAX_TOKENS_COUNTED, _COUNTED_AT_ONCE, _READ_AT_ONCE = 10_000_000, 1000, 1000
# Increment whenever `make_blocks` returns different arrays: the cache depends on its arguments, not its code.
_BLOCKS_VERSION = 2


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder, open for reading.

    Args:
        train: Training documents.
        validation: Held-out documents.
        tokenizer: The tokenizer of both.
        digest: Digest of tokens and tokenizer, independent of where the folder is.
        folder: The prepared folder, in which blocks are cached.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    digest: str
    folder: Path

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return num_ids(self.tokenizer)

    def blocks(
        self,
        split: str,
        *,
        chunk_size: int,
        block_size: int,
        layout: Layout = "documents",
        seed: int = 0,
    ) -> datasets.Dataset:
        """Lay out a split in blocks of `block_size` tokens with the features of `calm.data.chunking`."""
        documents = {"train": self.train, "validation": self.validation}[split]
        check_block_size(block_size, chunk_size)
        settings = {
            "chunk_size": chunk_size,
            "block_size": block_size,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            "layout": layout,
            "seed": as_seed(seed),
        }
        # The 1 stands for one process: several would get other batches of documents, hence other blocks.
        key = json.dumps([_BLOCKS_VERSION, self.digest, settings, 1]).encode()
        cache = _writable(self.folder) / "blocks"
        cache.mkdir(exist_ok=True)
        file = cache / f"{split}-{hashlib.blake2b(key, digest_size=12).hexdigest()}.arrow"
        make = partial(
            documents.map,
            partial(_blocks_of_batch, **settings),
            with_indices=True,
            batched=True,
            remove_columns=documents.column_names,
            cache_file_name=str(file),
            load_from_cache_file=True,
            desc=f"chunking {split}",
        )
        return load_or_make(make, cache, f"blocks of {split}").with_format("torch")

    def counts(self) -> Counts:
        """Number of documents and tokens in both splits."""
        return count(self.train, self.validation)

    def token_counts(self) -> np.ndarray:
        """How often each token id occurs in the training text, EOS included, (V,).

        Only the first 10 million tokens are counted.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for tokens in self._first_tokens():
            counts += np.bincount(tokens, minlength=self.vocab_size)
        return counts

    def neighbour_counts(self) -> np.ndarray:
        """How often each token follows, and precedes, each of the N most frequent ones, (V, 2 N), float32.

        Counted over the same tokens as `token_counts`; EOS is a token like any other.
        """
        frequent = np.argsort(-self.token_counts(), kind="stable")[:_NUM_FREQUENT]
        columns = np.full(self.vocab_size, -1)  # Of the tokens that are not frequent: -1.
        columns[frequent] = np.arange(len(frequent))
        width = 2 * len(frequent)
        counts = np.zeros(self.vocab_size * width, dtype=np.float32)
        for tokens in self._first_tokens():
            before, after = (tokens[1:], tokens[:-1]), (tokens[:-1], tokens[1:])
            for side, (centres, neighbours) in enumerate((before, after)):
                is_counted = columns[neighbours] >= 0
                column = columns[neighbours[is_counted]] + side * len(frequent)
                np.add.at(counts, centres[is_counted] * width + column, np.float32(1))
        return counts.reshape(-1, width)

    def training_stream(self) -> tuple[np.ndarray, np.ndarray]:
        """The training documents one after another, with EOS after each, and their lengths, EOS included."""
        stream, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for batch_lengths, tokens in _arrays_of(self.train):
            stream.append(np.insert(tokens, batch_lengths.cumsum(), self.tokenizer.eos_token_id))
            lengths.append(batch_lengths + 1)
        return np.concatenate(stream), np.concatenate(lengths)

    def _first_tokens(self) -> Iterator[np.ndarray]:
        """Yield the first 10 million tokens of the training text, EOS included, many documents at a time."""
        total = 0
        for batch in self.train.with_format("numpy").iter(_COUNTED_AT_ONCE):  # Documents may be very short.
            documents = batch["input_ids"]
            totals = total + np.cumsum([len(tokens) + 1 for tokens in documents])
            last = int(np.searchsorted(totals, _MAX_TOKENS_COUNTED))
            eos = np.array([self.tokenizer.eos_token_id])
            yield np.concatenate([part for tokens in documents[: last + 1] for part in (tokens, eos)])
            total = totals[min(last, len(totals) - 1)]
            if total >= _MAX_TOKENS_COUNTED:
                break

    def held_out_beginnings(self, number: int) -> list[tuple[str, str]]:
        """The first words of the first held-out documents, and how each continues."""
        documents = self.validation.select(range(min(number, len(self.validation))))
        texts = self.tokenizer.batch_decode(documents[:]["input_ids"], skip_special_tokens=True)
        first_words = [" ".join(text.split(" ")[:_BEGINNING_WORDS]) for text in texts]
        beginnings = [words[:_BEGINNING_CHARACTERS] for words in first_words]
        return [(start, text[len(start) :]) for start, text in zip(beginnings, texts, strict=True)]


def load_prepared(path: Path | str, *, verify: bool = True) -> PreparedData:
    """Open a prepared folder.

    Args:
        path: The folder.
        verify: Whether to compare all files with their checksums, which reads them.

    Raises:
        InputError: If it is not a prepared folder, or is damaged.
    """
    path = Path(path)
    if not (path / INFO).is_file():
        raise InputError(f"'{path}' is not a prepared folder (it has no {INFO}); run `calm prepare` first.")
    try:
        problems = find_damage(path) if verify else []
    except FileNotFoundError:  # Written by an earlier version.
        _check_sizes(path)
    else:
        if problems:
            raise InputError(f"the prepared folder '{path}' is damaged: {problems[0]}; prepare it again.")
    try:
        train, validation = (datasets.load_from_disk(path / name) for name in ("train", "validation"))
        tokenizer = load_tokenizer(str(path / "tokenizer"))
        digest = read_info(path).get("digest") or digest_of(train, validation, tokenizer)
        return PreparedData(train, validation, tokenizer, digest, path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"the prepared folder '{path}' is damaged ({reason_of(error)}); prepare it again."
        ) from error


def _check_sizes(path: Path) -> None:
    """Raise InputError if a file differs in size from what was written: reading it could return garbage."""
    try:
        sizes = json.loads((path / INFO).read_text(encoding="utf-8"))["bytes"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"'{path / INFO}' is damaged or of an earlier version, or {CHECKSUMS} is missing; prepare the "
            "text again."
        ) from error
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else 0
        if actual != size:
            raise InputError(
                f"'{path / name}' is damaged ({actual} bytes instead of {size}); prepare the text again."
            )


def held_out_data(
    sources: list[str], tokenizer: PreTrainedTokenizerBase, options: ReadingOptions
) -> PreparedData:
    """Held-out text for scoring, tokenized with a model's own tokenizer.

    Args:
        sources: A folder prepared with the same tokenizer; or saved splits, of which the held-out part is
            scored, and files, folders or hub datasets, which are scored whole.
        tokenizer: The model's tokenizer.
        options: How to find documents in the sources.

    Raises:
        InputError: If a source is bad, or a folder was prepared with another tokenizer.
    """
    if len(sources) == 1 and is_prepared(Path(sources[0])):
        data = load_prepared(Path(sources[0]))
        if data.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"'{sources[0]}' was prepared with a different tokenizer from the model's; give the raw "
                "text, or prepare it with --tokenizer MODEL."
            )
        return data
    folder = temporary_folder()
    scored = [rows for source in sources for rows in validation_rows([source]) or [source]]
    texts = load_documents(scored, options, cache_dir=str(folder)).texts
    documents = tokenize(texts, tokenizer, 1, "held-out text", folder / "tokens.arrow")
    no_documents = documents.select([])
    digest = digest_of(no_documents, documents, tokenizer)
    return PreparedData(no_documents, documents, tokenizer, digest, folder)


def digest_of(
    train: datasets.Dataset, validation: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
) -> str:
    """A digest of the documents' tokens and their tokenizer, however they are divided into files."""
    tokenizer_state = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else repr(sorted(tokenizer.get_vocab().items()))
    )
    digest = hashlib.blake2b(tokenizer_state.encode(), digest_size=16)
    for split in (train, validation):
        length_digest, token_digest = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        for lengths, tokens in _arrays_of(split):
            length_digest.update(lengths.astype("<i8").tobytes())
            token_digest.update(tokens.astype("<i4").tobytes())
        digest.update(length_digest.digest() + token_digest.digest())
    return digest.hexdigest()


def _arrays_of(split: datasets.Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the lengths of a batch of documents and their concatenated tokens, batch after batch."""
    for table in split.with_format("arrow").iter(_READ_AT_ONCE):
        for documents in table["input_ids"].chunks:
            yield documents.value_lengths().to_numpy(), documents.flatten().to_numpy()


def _writable(folder: Path) -> Path:
    """The folder if it is writable, else a temporary one that is removed when this process ends."""
    if os.access(folder, os.W_OK):
        return folder
    temporary = temporary_folder()
    logger.info("'%s' cannot be written; blocks of its text are kept in '%s' for now.", folder, temporary)
    return temporary


def is_prepared(path: Path) -> bool:
    """Whether a path is a prepared folder."""
    return (path / INFO).is_file()


def split_of(path: Path) -> Split:
    """The split that a folder was prepared with; it applies to further text from the same sources, too."""
    info = read_info(path)
    return Split(info.get("seed", 0), info["held_out_below"], info.get("part_bytes"))


def settings_of(path: Path) -> dict[str, Any]:
    """The arguments of `prepare` that determine a folder's text; of an earlier version, its sources."""
    info = read_info(path)
    if "settings" not in info:
        return {"sources": info["sources"]}
    return {"sources": info["sources"], "seed": info["seed"], **info["options"], **info["settings"]}


def read_info(path: Path) -> dict[str, Any]:
    """What `calm prepare` recorded in the folder's `prepared.json`."""
    return read_json(path / INFO, dict)


def _blocks_of_batch(batch: dict, indices: list[int], **settings: Any) -> dict[str, np.ndarray]:
    return make_blocks(batch["input_ids"], indices, **settings)
