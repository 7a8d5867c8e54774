"""Text -> a prepared folder (`calm.data.prepared`): read, split, tokenized.

Chunking happens later (`calm.data.chunking`), so one prepared folder serves every chunk size.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from calm.data.counts import count
from calm.data.pieces import kept_work, ranks_of, tokens_of, trained_tokenizer
from calm.data.prepared import INFO, PreparedData, digest_of, load_prepared, read_info
from calm.data.reading import ReadingOptions
from calm.data.sources import check_sources, load_documents
from calm.data.splitting import Split, choose_split, split_documents
from calm.data.tokenizer import check_vocab_size, load_tokenizer
from calm.errors import InputError
from calm.storage.folders import check_output, check_spared, written_whole
from calm.storage.ours import PREPARED


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
                "digest": digest_of(**parts, tokenizer=tokens),
            }
            (folder / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
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
    info = read_info(path)
    is_sample = info.get("sample_documents") is not None
    data.counts().tell(info.get("validation_fraction"), is_sample=is_sample)
