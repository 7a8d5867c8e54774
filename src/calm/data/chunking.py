"""Documents of token ids -> blocks of whole chunks, for every stage of training and for scoring.

Two layouts:
  documents  each document is laid out as padding (a random offset inside its first chunk), its tokens,
             one EOS, and padding to a chunk boundary; documents in one block do not see each other.
  packed     documents with their EOS are simply concatenated and cut into blocks, as in the
             published evaluation; chunks may span documents, and a block is one long context.

A block has four features: `input_ids` (T), `labels` (T, -100 on padding), `position_ids` (C), the
position of each chunk in its document, restarting from 0 with each document, and `document_ids` (C), the
number of the document in which each chunk starts.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calm.core.chunks import IGNORED_LABEL
from calm.core.seeds import as_seed
from calm.errors import InputError

Layout = Literal["documents", "packed"]


@dataclass(frozen=True)
class BlockSettings:
    """How text is laid out in blocks; of held-out text, this is part of the protocol of its scores.

    Args:
        block_size: Tokens per block.
        layout: How documents are aligned to chunks.
        seed: Seed of the offsets at which documents start in their first chunk.
    """

    block_size: int
    layout: Layout = "documents"
    seed: int = 0

    def __str__(self) -> str:
        return f"blocks of {self.block_size} tokens, layout {self.layout}"


def make_blocks(
    documents: list[list[int]],
    indices: list[int],
    *,
    chunk_size: int,
    block_size: int,
    eos_token_id: int,
    pad_token_id: int,
    layout: Layout = "documents",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Lay documents out in blocks; only the last block of the batch is padded to full length.

    Args:
        documents: Token ids of each document, without EOS.
        indices: Number of each document in its dataset; with the seed, it determines the random offset.
        chunk_size: Tokens per chunk K.
        block_size: Tokens per block T, a multiple of K.
        eos_token_id: Id that ends each document.
        pad_token_id: Id of padding.
        layout: How documents are aligned to chunks.
        seed: Seed of the random offsets.

    Returns:
        `input_ids` and `labels` (blocks, T), `position_ids` and `document_ids` (blocks, C); int64.

    Raises:
        InputError: If the block size is not a multiple of the chunk size.
    """
    check_block_size(block_size, chunk_size)
    padded, masks, positions, document_ids = [], [], [], []
    for document, index in zip(documents, indices, strict=True):
        tokens = np.append(np.asarray(document, dtype=np.int64), eos_token_id)
        front = _offset(seed, index, chunk_size) if layout == "documents" else 0
        back = -(front + len(tokens)) % chunk_size if layout == "documents" else 0
        padded.append(np.pad(tokens, (front, back), constant_values=pad_token_id))
        masks.append(np.pad(np.ones(len(tokens), dtype=bool), (front, back)))
        document_ids.append(np.full(len(padded[-1]), index))
        if layout == "documents":
            positions.append(np.arange(len(padded[-1]) // chunk_size))
    stream, mask = _to_rows(padded, block_size, pad_token_id), _to_rows(masks, block_size, False)
    chunks_per_block = block_size // chunk_size
    if layout == "documents":
        position_ids = _to_rows(positions, chunks_per_block, 0)
        # A document that continues from the previous block gets positions as if it started here.
        continues = _leading_run(position_ids)
        position_ids = np.where(continues, np.arange(chunks_per_block), position_ids)
    else:
        position_ids = np.tile(np.arange(chunks_per_block), (len(stream), 1))
    return {
        "input_ids": stream,
        "labels": np.where(mask, stream, IGNORED_LABEL),
        "position_ids": position_ids,
        "document_ids": _to_rows(document_ids, block_size, indices[-1])[:, ::chunk_size],
    }


def check_block_size(block_size: int, chunk_size: int) -> None:
    """Raise InputError unless a block is a whole number of chunks, at least two."""
    if block_size % chunk_size or block_size < 2 * chunk_size:
        raise InputError(
            f"the block size (context) must be a multiple of the chunk size {chunk_size} and hold at "
            f"least 2 chunks, got {block_size} tokens."
        )


def _offset(seed: int, index: int, chunk_size: int) -> int:
    """Padding tokens in front of a document: uniform over 0..K-1, determined by seed and index."""
    digest = hashlib.blake2b(f"{as_seed(seed)}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % chunk_size


def _to_rows(pieces: list[np.ndarray], width: int, fill: int) -> np.ndarray:
    stream = np.concatenate(pieces)
    return np.pad(stream, (0, -len(stream) % width), constant_values=fill).reshape(-1, width)


def _leading_run(position_ids: np.ndarray) -> np.ndarray:
    """Chunks before the first document start of each row."""
    return np.cumsum(position_ids == 0, axis=1) == 0
