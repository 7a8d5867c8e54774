"""Text -> a prepared folder: tokenizer, tokenized training and validation documents.

    folder/
      train/ validation/   datasets with one column, `input_ids`: the tokens of a document, no EOS
      tokenizer/           a tokenizer folder of transformers
      prepared.json        what was prepared, from what

Chunking happens later (`calm.data.chunking`), so one prepared folder serves every chunk size.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from calm.data.chunking import Layout, check_block_size, make_blocks
from calm.data.counts import Counts, count
from calm.data.pieces import kept_work, ranks_of, tokenized, tokens_of, trained_tokenizer
from calm.data.sources import ReadingOptions, check_sources, load_documents
from calm.data.splitting import Split, choose_split, split_documents
from calm.data.tokenizer import check_vocab_size, load_tokenizer
from calm.errors import InputError
from calm.storage.folders import check_output, check_spared, written_whole
from calm.storage.ours import PREPARED

_INFO = "prepared.json"
_WORDS_OF_BEGINNING = 24
_MOST_COUNTED, _COUNTED_AT_ONCE = 10_000_000, 1000
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

    def counts(self) -> Counts:
        """Documents and tokens of both parts."""
        return count(self.train, self.validation)

    def token_counts(self) -> np.ndarray:
        """How often each token id occurs in the training text, ends of text included, (V,).

        Of a long text only the first millions of tokens are counted.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for batch in self.train.with_format("numpy").iter(_COUNTED_AT_ONCE):  # Documents may be very short.
            documents = batch["input_ids"]
            totals = counts.sum() + np.cumsum([len(tokens) + 1 for tokens in documents])
            documents = documents[: np.searchsorted(totals, _MOST_COUNTED) + 1]
            counts += np.bincount(np.concatenate(documents), minlength=self.vocab_size)
            counts[self.tokenizer.eos_token_id] += len(documents)
            if counts.sum() >= _MOST_COUNTED:
                break
        return counts

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

    The held-out split goes by whole documents, or by parts of long ones where documents are too coarse
    (`calm.data.splitting`). Work that was stopped is taken up again (`calm.data.pieces`).

    Args:
        sources: Files, folders or hub datasets; see `calm.data.sources`.
        output: The prepared folder; appears only when it is complete.
        options: How documents are found in the sources.
        tokenizer: Folder, file or hub name of a tokenizer; None trains a BPE on the training split.
        vocab_size: Size of a trained vocabulary.
        validation_sources: Where held-out documents come from; none splits `sources`.
        validation_fraction: Share of the text held out where `sources` is split.
        seed: Changes which documents are held out.
        num_proc: Processes; all cores when None.
        most: Documents of each file that are read at most: a sample of text that is streamed.
        overwrite: Whether an existing output folder is replaced.

    Raises:
        InputError: If a source or setting is bad, or there is too little text to split.
        RunError: If the disk is full, or a process dies.
    """
    options = options or ReadingOptions()
    num_proc = num_proc or os.cpu_count() or 1
    replaces = PREPARED if overwrite else None
    check_spared(output, [*sources, *validation_sources, *([] if tokenizer is None else [tokenizer])])
    check_output(output, replaces)
    given = check_text(
        sources,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_sources=validation_sources,
        validation_fraction=validation_fraction,
    )
    with kept_work(output) as work:
        read = partial(load_documents, options=options, cache_dir=str(work), num_proc=num_proc)
        documents = read(sources, most=most)
        ranks = ranks_of(documents, seed)
        split = Split(seed)
        if validation_sources:
            held_out = read(list(validation_sources))
            splits = {"train": (documents, ranks), "validation": (held_out, ranks_of(held_out, seed))}
        else:
            split = choose_split(documents, ranks, validation_fraction, seed, sources)
            splits = split_documents(documents, ranks, split, work)
        tokens = given or trained_tokenizer(*splits["train"], vocab_size, work)
        parts = {
            name: tokens_of(*part, tokens, work, num_proc=num_proc, name=name)
            for name, part in splits.items()
        }
        with written_whole(output, replaces) as folder:
            for name, part in parts.items():
                part.save_to_disk(folder / name)
            tokens.save_pretrained(folder / "tokenizer")
            info = {
                "sources": sources,
                "options": asdict(options),
                "vocab_size": len(tokens),
                **asdict(count(**parts)),
                "seed": seed,
                "validation_fraction": None if validation_sources else validation_fraction,
                "held_out_below": split.highest,
                "part_bytes": split.part_bytes,
                "sample_documents": most,
                "bytes": {name: size for part in parts for name, size in _sizes(folder, part).items()},
            }
            (folder / _INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    data = load_prepared(output)
    tell_counts(output, data)
    return data


def check_text(
    sources: Sequence[str],
    *,
    tokenizer: str | None,
    vocab_size: int,
    validation_sources: Sequence[str],
    validation_fraction: float,
) -> PreTrainedTokenizerBase | None:
    """Find the mistakes of what is to be prepared before anything is written; the arguments of `prepare`.

    Returns:
        The tokenizer, if one is named.

    Raises:
        InputError: If a source is missing or of an unknown format, or a setting is bad.
    """
    if named := [*sources, *validation_sources]:
        check_sources(named)
    if not validation_sources and not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}.")
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    check_vocab_size(vocab_size)
    return None


def tell_counts(path: Path, data: PreparedData) -> None:
    """Log how much text of a prepared folder is trained on and held out."""
    info = _read_info(path)
    is_sample = info.get("sample_documents") is not None
    data.counts().tell(info.get("validation_fraction"), is_sample=is_sample)


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
    documents = tokenized(load_documents(sources, options), tokenizer, 1, "held-out text")
    return PreparedData(train=documents.select([]), validation=documents, tokenizer=tokenizer)


def is_prepared(path: Path) -> bool:
    """Whether a path is a prepared folder."""
    return (path / _INFO).is_file()


def split_of(path: Path) -> Split:
    """What is held out of the text that a folder was prepared from, and of more text of that kind."""
    info = _read_info(path)
    return Split(info.get("seed", 0), info["held_out_below"], info.get("part_bytes"))


def sources_of(path: Path) -> list[str]:
    """What a prepared folder was prepared from."""
    return _read_info(path)["sources"]


def _read_info(path: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads((path / _INFO).read_text(encoding="utf-8"))
    return info


def _blocks_of_batch(
    batch: dict, indices: list[int], *, format_number: int, **settings: Any
) -> dict[str, np.ndarray]:
    assert format_number == _FORMAT_OF_BLOCKS
    return make_blocks(batch["input_ids"], indices, **settings)
