"""Text -> a prepared folder: tokenizer, tokenized training and validation documents.

    folder/
      train/ validation/   datasets with one column, `input_ids`: the tokens of a document, no EOS
      tokenizer/           a tokenizer folder of transformers
      prepared.json        what was prepared, from what

Chunking happens later (`calm.data.chunking`), so one prepared folder serves every chunk size.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from calm.data.chunking import Layout, check_block_size, make_blocks
from calm.data.folders import written_whole
from calm.data.sources import ReadingOptions, load_documents
from calm.data.tokenizer import load_tokenizer, tokenize, train_tokenizer
from calm.errors import InputError, RunError

_INFO = "prepared.json"
_DOCUMENTS_FOR_TOKENIZER = 200_000
_WORDS_OF_BEGINNING = 24
# Raised whenever `make_blocks` gives other arrays: datasets keeps blocks in a cache by the arguments of the
# function that made them, and does not see its code.
_FORMAT_OF_BLOCKS = 2


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder, open for reading.

    Args:
        train: Documents to train on.
        validation: Documents held out.
        tokenizer: The tokenizer of both.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self.tokenizer)

    def blocks(
        self,
        split: str,
        *,
        chunk_size: int,
        block_size: int,
        layout: Layout = "documents",
        seed: int = 0,
        num_proc: int = 1,
    ) -> datasets.Dataset:
        """A split as blocks of `block_size` tokens with the features of `calm.data.chunking`."""
        documents = {"train": self.train, "validation": self.validation}[split]
        check_block_size(block_size, chunk_size)
        make = partial(
            documents.map,
            partial(
                _blocks_of_batch,
                format_number=_FORMAT_OF_BLOCKS,
                chunk_size=chunk_size,
                block_size=block_size,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                layout=layout,
                seed=seed,
            ),
            with_indices=True,
            batched=True,
            remove_columns=documents.column_names,
            num_proc=num_proc if num_proc > 1 else None,
            desc=f"chunking {split}",
        )
        try:
            blocks = make()
        except OSError as error:
            if error.errno is not None:  # Of the disk. Without a number: blocks in the cache are damaged.
                raise
            blocks = make(load_from_cache_file=False)
        return blocks.with_format("torch")

    def held_out_beginnings(self, number: int) -> list[tuple[str, str]]:
        """First words of the first held-out documents, and how each goes on."""
        few = self.validation.select(range(min(number, len(self.validation))))
        texts = self.tokenizer.batch_decode(few[:]["input_ids"], skip_special_tokens=True)
        beginnings = [" ".join(text.split(" ")[:_WORDS_OF_BEGINNING]) for text in texts]
        return [(start, text[len(start) :]) for start, text in zip(beginnings, texts, strict=True)]


def prepare(
    sources: list[str],
    output: Path,
    *,
    options: ReadingOptions | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    validation_sources: Sequence[str] = (),
    validation_fraction: float = 0.02,
    seed: int = 0,
    num_proc: int | None = None,
    most: int | None = None,
    overwrite: bool = False,
) -> PreparedData:
    """Read, split and tokenize text, and write a prepared folder.

    The held-out split goes by whole documents, and equal documents go to the same side.

    Args:
        sources: Files, folders or hub datasets; see `calm.data.sources`.
        output: The prepared folder; appears only when it is complete.
        options: How documents are found in the sources.
        tokenizer: Folder, file or hub name of a tokenizer; None trains a BPE on the training split.
        vocab_size: Size of a trained vocabulary.
        validation_sources: Where held-out documents come from; none splits `sources`.
        validation_fraction: Share of documents held out where `sources` is split.
        seed: Changes which documents are held out.
        num_proc: Processes; all cores when None.
        most: Documents of each file that are read at most: a sample of text that is streamed.
        overwrite: Whether an existing output folder is replaced.

    Raises:
        InputError: If a source or setting is bad, or there are too few documents to split.
    """
    options = options or ReadingOptions()
    num_proc = num_proc or os.cpu_count() or 1
    with written_whole(output, overwrite) as folder:
        read = partial(load_documents, options=options, cache_dir=str(folder / "cache"), num_proc=num_proc)
        documents = read(sources, most=most)
        highest = None
        if validation_sources:
            splits = {"train": documents, "validation": read(list(validation_sources))}
        else:
            splits, highest = _split(documents, validation_fraction, seed, sources)
        tokens: PreTrainedTokenizerBase
        if tokenizer is None:
            texts = splits["train"].select(range(min(_DOCUMENTS_FOR_TOKENIZER, len(splits["train"]))))
            tokens = train_tokenizer((row["text"] for row in texts), vocab_size)
        else:
            tokens = load_tokenizer(tokenizer)
        for name, split in splits.items():
            try:
                _tokenized(split, tokens, num_proc, name).save_to_disk(folder / name)
            except RuntimeError as error:
                if "abruptly died" not in str(error):
                    raise
                raise RunError(
                    "a process that tokenizes died (out of memory?); try a smaller num_proc. "
                    "Nothing that was there is lost."
                ) from error
        tokens.save_pretrained(folder / "tokenizer")
        info = {
            "sources": sources,
            "options": asdict(options),
            "vocab_size": len(tokens),
            "documents": {name: len(split) for name, split in splits.items()},
            "seed": seed,
            "held_out_below": highest,
            "bytes": {name: size for split in splits for name, size in _sizes(folder, split).items()},
        }
        (folder / _INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder / "cache", ignore_errors=True)
    return load_prepared(output)


def load_prepared(path: Path) -> PreparedData:
    """Open a prepared folder.

    Raises:
        InputError: If it is not one, or is damaged.
    """
    if not (path / _INFO).is_file():
        raise InputError(f"'{path}' is not a prepared folder (it has no {_INFO}); run `calm prepare` first.")
    _check_sizes(path)
    try:
        return PreparedData(
            train=datasets.load_from_disk(path / "train"),
            validation=datasets.load_from_disk(path / "validation"),
            tokenizer=load_tokenizer(str(path / "tokenizer")),
        )
    except (OSError, ValueError) as error:
        raise InputError(f"the prepared folder '{path}' is damaged ({error}); prepare it again.") from error


def _sizes(folder: Path, split: str) -> dict[str, int]:
    """Bytes of the files of a split, by their path in the prepared folder."""
    files = sorted((folder / split).glob("*.arrow"))
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _check_sizes(path: Path) -> None:
    """Raise InputError if a file has not the size that it was written with: reading it could go astray."""
    try:
        sizes = json.loads((path / _INFO).read_text(encoding="utf-8"))["bytes"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{path / _INFO}' is damaged or of an earlier version; prepare the text again."
        ) from error
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != size:
            raise InputError(
                f"'{path / name}' is damaged ({found} bytes instead of {size}); prepare the text again."
            )


def held_out_data(
    sources: list[str], tokenizer: PreTrainedTokenizerBase, options: ReadingOptions
) -> PreparedData:
    """Text to score with a model's own tokenizer.

    Args:
        sources: A prepared folder of the same tokenizer, of which the held-out part is scored, or
            files, folders or hub datasets, of which all is.
        tokenizer: The model's tokenizer.
        options: How documents are found in sources.

    Raises:
        InputError: If a source is bad, or a folder was prepared with another tokenizer.
    """
    if len(sources) == 1 and is_prepared(Path(sources[0])):
        data = load_prepared(Path(sources[0]))
        if data.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"'{sources[0]}' was prepared with another tokenizer than the model's; "
                "give the text itself, or prepare it with --tokenizer MODEL."
            )
        return data
    documents = _tokenized(load_documents(sources, options), tokenizer, 1, "held-out text")
    return PreparedData(train=documents.select([]), validation=documents, tokenizer=tokenizer)


def is_prepared(path: Path) -> bool:
    """Whether a path is a prepared folder."""
    return (path / _INFO).is_file()


def held_out_below(path: Path) -> int | None:
    """The highest rank that was held out when a folder was prepared; None if nothing was split."""
    return json.loads((path / _INFO).read_text(encoding="utf-8"))["held_out_below"]


def sources_of(path: Path) -> list[str]:
    """What a prepared folder was prepared from."""
    return json.loads((path / _INFO).read_text(encoding="utf-8"))["sources"]


def _split(
    documents: datasets.Dataset, fraction: float, seed: int, sources: list[str]
) -> tuple[dict[str, datasets.Dataset], int]:
    """Training and held-out documents, and the highest rank that is held out."""
    if not 0 < fraction < 1:
        raise InputError(f"validation_fraction must lie between 0 and 1, got {fraction}.")
    ranks = np.array([rank_of(row["text"], seed) for row in documents], dtype=np.uint64)
    distinct = np.unique(ranks)
    if len(distinct) < 2:
        raise InputError(
            f"{', '.join(sources)} holds one document, which cannot be split into training and held-out "
            "text; pass --separator to part it, or --validation with other text."
        )
    held_out = max(1, min(len(distinct) - 1, round(fraction * len(distinct))))
    highest = distinct[held_out - 1]
    is_held_out = ranks <= highest
    splits = {
        "train": documents.select(np.flatnonzero(~is_held_out)),
        "validation": documents.select(np.flatnonzero(is_held_out)),
    }
    return splits, int(highest)


def rank_of(text: str, seed: int) -> int:
    """A number of 64 bits for a document; those with the lowest are held out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big")


def _tokenized(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int, name: str
) -> datasets.Dataset:
    # A process costs more than it brings for a few documents.
    enough = len(documents) > 1000 * num_proc
    return documents.map(
        partial(_tokenize_batch, tokenizer=tokenizer),
        batched=True,
        remove_columns=documents.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        num_proc=num_proc if num_proc > 1 and enough else None,
        desc=f"tokenizing {name}",
    )


def _tokenize_batch(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    return {"input_ids": tokenize(tokenizer, batch["text"])}


def _blocks_of_batch(
    batch: dict, indices: list[int], *, format_number: int, **settings: Any
) -> dict[str, np.ndarray]:
    assert format_number == _FORMAT_OF_BLOCKS
    return make_blocks(batch["input_ids"], indices, **settings)
