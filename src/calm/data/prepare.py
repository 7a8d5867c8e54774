"""Text -> a prepared folder (`calm.data.prepared`): read, split and tokenized.

Chunking happens later (`calm.data.chunking`), so one prepared folder serves every chunk size.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from calm.core.seeds import as_seed
from calm.data.counts import count
from calm.data.engines import Engine, open_engine
from calm.data.options import ReadingOptions
from calm.data.pieces import load_or_train_tokenizer, tokenize_splits, work_folder
from calm.data.prepared import INFO, PreparedData, digest_of, load_prepared, read_info
from calm.data.rows import Source, as_sources, name_of, validation_rows
from calm.data.shards import check_sources
from calm.data.sources import load_documents
from calm.data.splitting import Split, choose_split, split_documents
from calm.data.tokenizer import check_vocab_size, load_tokenizer
from calm.errors import InputError
from calm.storage.folders import atomic_folder, check_inputs_outside, check_output
from calm.storage.ours import PREPARED
from calm.text.vocabulary import num_ids

logger = logging.getLogger(__name__)
_TOKEN_BYTES, _FILE_BYTES = 4, 500 * 10**6


def prepare(
    sources: Source | Sequence[Source],
    output: Path | str,
    *,
    options: ReadingOptions | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    validation_sources: Source | Sequence[Source] = (),
    validation_fraction: float = 0.02,
    seed: int = 0,
    num_proc: int | None = None,
    engine: Engine = "processes",
    max_documents: int | None = None,
    overwrite: bool = False,
) -> PreparedData:
    """Read, split and tokenize text, and write a prepared folder.

    The split holds out whole documents, or parts of long ones if whole documents are too coarse
    (`calm.data.splitting`). Interrupted work resumes (`calm.data.pieces`).

    Args:
        sources: Files, folders, hub datasets, or datasets of the library `datasets`; see `calm.data.sources`.
        output: The prepared folder; appears only when it is complete.
        options: How to find documents in the sources.
        tokenizer: Folder, file or hub name of a tokenizer; None trains a BPE on the training split.
        vocab_size: Size of a trained vocabulary.
        validation_sources: Where held-out documents come from; if empty, the split `validation` of a
            `DatasetDict` among the sources is used, or else `sources` is split.
        validation_fraction: Share of the text to hold out if `sources` is split.
        seed: Seed that decides which documents are held out.
        num_proc: Processes on this machine, or workers of the engine; None uses all cores.
        engine: What reads and tokenizes: processes on this machine, or Ray Data (`calm.data.engines`). The
            result is the same.
        max_documents: Maximum number of documents read from each file or dataset, for a sample of text that
            is streamed; None reads all.
        overwrite: Whether an existing output folder is replaced.

    Raises:
        InputError: If a source or setting is invalid, or there is too little text to split.
        RunError: If the disk is full, or a process dies.
    """
    options, seed, output = options or ReadingOptions(), as_seed(seed), Path(output)
    sources = as_sources(sources)
    names = [name_of(source) for source in sources]
    validation_sources = as_sources(validation_sources)
    if not validation_sources and (validation_sources := validation_rows(sources)):
        logger.info("text: its own split 'validation' is held out")
    replaces = PREPARED if overwrite else None
    inputs = [source for source in (*sources, *validation_sources, tokenizer) if isinstance(source, str)]
    check_inputs_outside(output, inputs)
    check_output(output, replaces)
    named_tokenizer = check_text(
        sources,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_sources=validation_sources,
        validation_fraction=validation_fraction,
    )
    with open_engine(engine, num_proc) as run_ahead, work_folder(output) as work:
        # Ray's workers run one piece each.
        num_proc = 1 if engine == "ray" else num_proc or os.cpu_count() or 1
        read = partial(
            load_documents,
            options=options,
            seed=seed,
            cache_dir=str(work.absolute()),
            num_proc=num_proc,
            max_documents=max_documents,
            run_ahead=run_ahead,
        )
        documents = read(sources)
        held_out = read(validation_sources) if validation_sources else None
        if held_out is None:
            split = choose_split(documents.texts, documents.ranks, validation_fraction, seed, names)
            splits = split_documents(documents.texts, documents.ranks, split, work)
        else:
            split = Split(seed)
            splits = {
                "train": (documents.texts, documents.ranks),
                "validation": (held_out.texts, held_out.ranks),
            }
        used_tokenizer = named_tokenizer
        if used_tokenizer is None:
            used_tokenizer = load_or_train_tokenizer(*splits["train"], vocab_size, work)
        tokens = tokenize_splits(splits, used_tokenizer, work, num_proc=num_proc, run_ahead=run_ahead)
        counts, digest = count(**tokens), digest_of(**tokens, tokenizer=used_tokenizer)
        with atomic_folder(output, replaces) as folder:
            for name, documents_of_split in tokens.items():
                _save(documents_of_split, folder / name, counts.tokens[name], f"{digest}-{name}")
            used_tokenizer.save_pretrained(folder / "tokenizer")
            info = {
                "sources": names,
                "options": asdict(options),
                "vocab_size": num_ids(used_tokenizer),
                **asdict(counts),
                "records_without_text": documents.num_skipped + (held_out.num_skipped if held_out else 0),
                "seed": seed,
                "validation_fraction": None if validation_sources else validation_fraction,
                "held_out_below": split.highest,
                "part_bytes": split.part_bytes,
                "sample_documents": max_documents,
                "digest": digest,
                "settings": {
                    "validation_sources": [name_of(source) for source in validation_sources],
                    "validation_fraction": validation_fraction,
                    "tokenizer": tokenizer,
                    "vocab_size": vocab_size,
                },
            }
            (folder / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    data = load_prepared(output)
    log_counts(output, data)
    return data


def check_text(
    sources: Sequence[Source],
    *,
    tokenizer: str | None,
    vocab_size: int,
    validation_sources: Sequence[Source],
    validation_fraction: float,
) -> PreTrainedTokenizerBase | None:
    """Check arguments of `prepare` before anything is written.

    Returns:
        The tokenizer, if one is named.

    Raises:
        InputError: If a source is missing or of an unknown format, or a setting is invalid.
    """
    if all_sources := [*sources, *validation_sources]:
        check_sources(all_sources)
    if not validation_sources and not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}.")
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    check_vocab_size(vocab_size)
    return None


def _save(documents: datasets.Dataset, folder: Path, num_tokens: int, fingerprint: str) -> None:
    """Write tokens so that the same tokens give the same bytes, whatever pieces they were made in."""
    num_files = 1 + _TOKEN_BYTES * num_tokens // _FILE_BYTES
    documents = datasets.Dataset(documents.data, fingerprint=fingerprint)
    documents.save_to_disk(folder, num_shards=min(num_files, len(documents)))


def log_counts(path: Path, data: PreparedData) -> None:
    """Log how much of a prepared folder's text is trained on and held out."""
    info = read_info(path)
    is_sample = info.get("sample_documents") is not None
    data.counts().log(info.get("validation_fraction"), is_sample=is_sample)
