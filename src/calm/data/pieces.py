"""Long work on text, done piece by piece in a folder that survives a kill: the same command resumes there.

    .NAME.work/            beside the prepared folder NAME, until that is complete
      generator/           documents that were read, one group of files each (datasets' own cache)
      tokenizer-DIGEST/    a trained tokenizer
      tokens-DIGEST/       tokens of up to 100,000 documents

Pieces are named by a digest of what they depend on, so a stale one is never used; nor is an unfinished one.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from calm.data.caching import load_or_make
from calm.data.engines import RunAhead, run_none
from calm.data.tokenizer import load_tokenizer, train_tokenizer
from calm.errors import InputError, RunError
from calm.storage.disk import disk_errors
from calm.storage.folders import atomic_folder, new_folder, work_path
from calm.storage.locks import locked
from calm.text.encoding import encode_documents

_DOCUMENTS_PER_PIECE = 100_000
_DOCUMENTS_FOR_TOKENIZER = 200_000


@contextlib.contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """Provide the work folder of `output`; it is removed at the end, but kept if an error left two pieces.

    Raises:
        RunError: If the disk is full or cannot be written.
    """
    folder = work_path(output)
    with (
        disk_errors(output),
        new_folder(output.parent),
        locked(folder.with_name(f"{folder.name}.lock"), f"'{output}'"),
    ):
        folder.mkdir(exist_ok=True)
        try:
            with disk_errors(output):
                yield folder
        except (InputError, RunError) as error:
            if _num_pieces(folder) < 2:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            raise type(error)(
                f"{error} The work already done is kept in '{folder}'; run the same command again to resume."
            ) from error
        shutil.rmtree(folder, ignore_errors=True)


def _num_pieces(folder: Path) -> int:
    readings = [file for file in folder.glob("generator/*/*/*.arrow") if file.parent.suffix != ".incomplete"]
    return len(readings) + len([*folder.glob("tokenizer-*"), *folder.glob("tokens-*/*.arrow")])


def ranks_of(documents: datasets.Dataset, seed: int) -> np.ndarray:
    """The rank of each document, an unsigned 64-bit number computed from its text and the seed."""
    return np.fromiter((rank_of(row["text"], seed) for row in documents), np.uint64, len(documents))


def rank_of(text: str, seed: int) -> int:
    """The rank of a document, an unsigned 64-bit number; documents with the lowest ranks are held out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big")


def load_or_train_tokenizer(
    documents: datasets.Dataset, ranks: np.ndarray, vocab_size: int, work: Path
) -> PreTrainedTokenizerBase:
    """Load the BPE trained on the first 200,000 documents, or train it if there is none yet.

    Raises:
        InputError: If the vocabulary cannot hold all bytes.
    """
    first = range(min(_DOCUMENTS_FOR_TOKENIZER, len(documents)))
    folder = work / f"tokenizer-{_digest(ranks[: len(first)], str(vocab_size))}"
    if not folder.is_dir():
        tokenizer = train_tokenizer((row["text"] for row in documents.select(first)), vocab_size)
        with atomic_folder(folder) as partial_folder:
            tokenizer.save_pretrained(partial_folder)
    return load_tokenizer(str(folder))


def tokenize_splits(
    splits: Mapping[str, tuple[datasets.Dataset, np.ndarray]],
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    *,
    num_proc: int,
    run_ahead: RunAhead = run_none,
) -> dict[str, datasets.Dataset]:
    """Tokenize splits into the column `input_ids`, reusing finished pieces.

    Args:
        splits: Name -> documents with the column `text`, and the rank of each.
        tokenizer: The tokenizer.
        work: Folder of pieces.
        num_proc: Number of processes.
        run_ahead: Makes pieces before they are needed (`calm.data.engines`).

    Raises:
        RunError: If a process dies.
    """
    pieces = {
        name: list(_make_pieces(name, *split, tokenizer, work, num_proc)) for name, split in splits.items()
    }
    run_ahead([piece for split in pieces.values() for piece in split])
    return {
        name: datasets.concatenate_datasets([piece() for piece in split]) for name, split in pieces.items()
    }


def _make_pieces(
    name: str,
    documents: datasets.Dataset,
    ranks: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    num_proc: int,
) -> Iterator[Callable[[], datasets.Dataset]]:
    """Yield functions that each tokenize some documents of a split, or load their tokens if they exist."""
    tokenizer_state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    starts = range(0, max(1, len(documents)), _DOCUMENTS_PER_PIECE)
    for number, start in enumerate(starts, 1):
        stop = min(start + _DOCUMENTS_PER_PIECE, len(documents))
        folder = work / f"tokens-{_digest(ranks[start:stop], tokenizer_state)}"
        folder.mkdir(exist_ok=True)
        make = partial(
            tokenize,
            documents.select(range(start, stop)),
            tokenizer,
            num_proc,
            f"{name} ({number} of {len(starts)})" if len(starts) > 1 else name,
            folder / "tokens.arrow",
        )
        yield partial(load_or_make, make, folder, "tokens")


def tokenize(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int,
    name: str,
    file: Path,
) -> datasets.Dataset:
    """Tokenize documents into the column `input_ids` of a file; an existing file is used as it is.

    Raises:
        RunError: If a process dies.
    """
    # For few documents, starting processes would take longer than it saves.
    is_parallel = num_proc > 1 and len(documents) > 1000 * num_proc
    try:
        return documents.map(
            partial(_tokenize_batch, tokenizer=tokenizer),
            batched=True,
            remove_columns=documents.column_names,
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
            num_proc=num_proc if is_parallel else None,
            cache_file_name=str(file),
            load_from_cache_file=True,
            desc=f"tokenizing {name}",
        )
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise RunError(
            "a tokenizing process died (out of memory?); try a smaller num_proc. No existing data was lost."
        ) from error


def _tokenize_batch(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    return {"input_ids": encode_documents(tokenizer, batch["text"])}


def _digest(ranks: np.ndarray, setting: str) -> str:
    return hashlib.blake2b(ranks.tobytes() + setting.encode(), digest_size=12).hexdigest()
