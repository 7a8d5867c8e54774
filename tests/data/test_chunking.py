"""Blocks of chunks: layouts written out by hand, and properties that hold for any documents."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.core.chunks import IGNORED_LABEL
from calm.data.chunking import check_block_size, make_blocks
from calm.errors import InputError

PAD, EOS = 0, 1
X = IGNORED_LABEL
quick = settings(max_examples=100, deadline=None, database=None)
document_lists = st.lists(st.lists(st.integers(0, 9), max_size=13), min_size=1, max_size=7)
sizes = {"chunk_size": st.integers(1, 5), "chunks": st.integers(2, 5), "seed": st.integers(0, 3)}
layouts = st.sampled_from(["documents", "packed"])


def blocks_of(documents, indices=None, *, chunk_size, block_size, **settings):
    indices = list(range(len(documents))) if indices is None else indices
    return make_blocks(
        documents,
        indices,
        chunk_size=chunk_size,
        block_size=block_size,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **settings,
    )


def offset_of(index, chunk_size, seed=0, document=(5,)):
    """How much padding precedes a document, as its labels show."""
    blocks = blocks_of(
        [list(document)],
        [index],
        chunk_size=chunk_size,
        block_size=chunk_size * (2 + len(document)),
        seed=seed,
    )
    return int(np.flatnonzero(blocks["labels"].ravel() != X)[0])


def with_offset(offset, chunk_size):
    return next(index for index in range(1000) if offset_of(index, chunk_size) == offset)


def assert_blocks(blocks, input_ids, labels, position_ids):
    assert blocks["input_ids"].tolist() == input_ids
    assert blocks["labels"].tolist() == labels
    assert blocks["position_ids"].tolist() == position_ids
    assert {column.dtype for column in blocks.values()} == {np.dtype(np.int64)}


def test_layout_with_chunks_of_one_token():
    """No offset, and padding only at the end; positions restart where a block ends inside a document."""
    assert_blocks(
        blocks_of([[5, 6], [7]], chunk_size=1, block_size=4),
        [[5, 6, 1, 7], [1, 0, 0, 0]],
        [[5, 6, 1, 7], [1, X, X, X]],
        [[0, 1, 2, 0], [0, 0, 0, 0]],
    )


def test_layout_with_chunks_of_two_tokens():
    assert_blocks(
        blocks_of([[5, 6, 7], [8]], [with_offset(1, 2), with_offset(0, 2)], chunk_size=2, block_size=4),
        [[0, 5, 6, 7], [1, 0, 8, 1]],
        [[X, 5, 6, 7], [1, X, 8, 1]],
        [[0, 1], [0, 0]],
    )


def test_layout_with_chunks_of_four_tokens():
    indices = [with_offset(3, 4), with_offset(2, 4), with_offset(0, 4)]
    assert_blocks(
        blocks_of([[5, 6], [7, 8, 9, 10], [11, 12, 13]], indices, chunk_size=4, block_size=12),
        [[0, 0, 0, 5, 6, 1, 0, 0, 0, 0, 7, 8], [9, 10, 1, 0, 11, 12, 13, 1, 0, 0, 0, 0]],
        [[X, X, X, 5, 6, 1, X, X, X, X, 7, 8], [9, 10, 1, X, 11, 12, 13, 1, X, X, X, X]],
        [[0, 1, 0], [0, 0, 0]],
    )


def test_document_that_spans_three_blocks():
    assert_blocks(
        blocks_of([[2, 3, 4, 5, 6, 7, 8, 9, 9], [8]], [with_offset(0, 2)] * 2, chunk_size=2, block_size=4),
        [[2, 3, 4, 5], [6, 7, 8, 9], [9, 1, 8, 1]],
        [[2, 3, 4, 5], [6, 7, 8, 9], [9, 1, 8, 1]],
        [[0, 1], [0, 1], [0, 0]],
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_packed_layout_concatenates_documents(chunk_size):
    """Documents and EOS one after another, whatever the chunk size and the seed."""
    assert_blocks(
        blocks_of(
            [[5, 6], [7], [8, 9, 10]], chunk_size=chunk_size, block_size=8, layout="packed", seed=chunk_size
        ),
        [[5, 6, 1, 7, 1, 8, 9, 10], [1, 0, 0, 0, 0, 0, 0, 0]],
        [[5, 6, 1, 7, 1, 8, 9, 10], [1, X, X, X, X, X, X, X]],
        [list(range(8 // chunk_size))] * 2,
    )


def test_padding_and_eos_ids_inside_a_document_are_text():
    blocks = blocks_of([[PAD, EOS, PAD]], chunk_size=2, block_size=4, layout="packed")
    assert_blocks(blocks, [[0, 1, 0, 1]], [[0, 1, 0, 1]], [[0, 1]])


@quick
@given(documents=document_lists, layout=layouts, **sizes)
def test_labels_without_padding_are_the_documents(documents, layout, chunk_size, chunks, seed):
    """In order, each followed by one EOS; wherever the label is -100, the token is padding."""
    block_size = chunk_size * chunks
    blocks = blocks_of(documents, chunk_size=chunk_size, block_size=block_size, layout=layout, seed=seed)
    labels, tokens = blocks["labels"].ravel(), blocks["input_ids"].ravel()
    expected = [token for document in documents for token in (*document, EOS)]
    assert labels[labels != X].tolist() == expected
    assert tokens[labels != X].tolist() == expected
    assert (tokens[labels == X] == PAD).all()
    assert blocks["input_ids"].shape[1] == block_size
    assert blocks["position_ids"].shape == (len(blocks["input_ids"]), chunks)


@quick
@given(
    documents=st.lists(st.lists(st.integers(2, 9), max_size=13), min_size=1, max_size=7),
    layout=layouts,
    **sizes,
)
def test_labels_are_ignored_exactly_on_padding(documents, layout, chunk_size, chunks, seed):
    """These documents do not contain the padding id, so it shows where the padding is."""
    blocks = blocks_of(
        documents, chunk_size=chunk_size, block_size=chunk_size * chunks, layout=layout, seed=seed
    )
    tokens, labels = blocks["input_ids"], blocks["labels"]
    assert ((labels == X) == (tokens == PAD)).all()
    assert (labels[labels != X] == tokens[labels != X]).all()


@quick
@given(documents=document_lists, **sizes)
def test_positions_restart_at_documents_and_blocks_only(documents, chunk_size, chunks, seed):
    """Also, no chunk mixes documents. Every token is the number of its document, plus 2."""
    numbered = [[number + 2] * len(document) for number, document in enumerate(documents)]
    blocks = blocks_of(numbered, chunk_size=chunk_size, block_size=chunk_size * chunks, seed=seed)
    number, padding_seen = 0, False
    for row_labels, row_positions in zip(blocks["labels"], blocks["position_ids"], strict=True):
        previous = None
        for chunk, position in zip(row_labels.reshape(-1, chunk_size), row_positions, strict=True):
            tokens = [int(token) for token in chunk if token != X]
            if not tokens:  # A padding chunk that fills up the last block.
                padding_seen = True
                assert position == 0
                continue
            assert not padding_seen
            assert set(tokens) <= {number + 2, EOS} and tokens.count(EOS) <= 1
            assert position == (0 if previous is None or previous[0] != number else previous[1] + 1)
            previous = (number, position)
            number += EOS in tokens
    assert number == len(documents)


def test_document_id_continues_in_the_next_block():
    blocks = blocks_of([[5, 6, 7, 8, 9], [7]], [11, 23], chunk_size=1, block_size=4)
    assert blocks["document_ids"].tolist() == [[11, 11, 11, 11], [11, 11, 23, 23]]


def test_packed_chunk_has_the_id_of_the_document_it_starts_in():
    blocks = blocks_of([[5, 6, 7, 8], [7, 7]], [4, 9], chunk_size=2, block_size=4, layout="packed")
    assert blocks["input_ids"].tolist() == [[5, 6, 7, 8], [1, 7, 7, 1]]
    assert blocks["document_ids"].tolist() == [[4, 4], [4, 9]]


@quick
@given(documents=document_lists, **sizes)
def test_packed_has_padding_only_at_the_end_of_the_last_block(documents, chunk_size, chunks, seed):
    blocks = blocks_of(
        documents, chunk_size=chunk_size, block_size=chunk_size * chunks, layout="packed", seed=seed
    )
    is_padding = blocks["labels"].ravel() == X
    assert is_padding.sum() < chunk_size * chunks
    assert (np.diff(is_padding.astype(int)) >= 0).all()
    assert (blocks["position_ids"] == np.arange(chunks)).all()


@quick
@given(documents=document_lists, **sizes)
def test_documents_layout_pads_less_than_a_chunk_around_each_document(documents, chunk_size, chunks, seed):
    block_size = chunk_size * chunks
    labels = blocks_of(documents, chunk_size=chunk_size, block_size=block_size, seed=seed)["labels"].ravel()
    num_tokens = sum(len(document) + 1 for document in documents)
    max_tokens = num_tokens + 2 * (chunk_size - 1) * len(documents)
    assert len(labels) <= -(-max_tokens // block_size) * block_size
    is_empty = (labels == X).reshape(-1, chunk_size).all(axis=1)
    assert is_empty.sum() < chunks and (np.diff(is_empty.astype(int)) >= 0).all()


@pytest.mark.parametrize("chunk_size", [2, 3, 4, 8])
def test_every_offset_occurs_about_equally_often(chunk_size):
    num = 1000
    counts = Counter(offset_of(index, chunk_size) for index in range(num))
    assert sorted(counts) == list(range(chunk_size))
    share = 1 / chunk_size
    assert max(abs(count - num * share) for count in counts.values()) < 5 * (num * share * (1 - share)) ** 0.5


@quick
@given(documents=document_lists, first=st.integers(0, 10_000), **sizes)
def test_the_offset_depends_on_seed_and_index_only(documents, first, chunk_size, chunks, seed):
    """Not on the text, the documents around it, or the block size."""
    numbered = [[number + 2] * (len(document) + 1) for number, document in enumerate(documents)]
    indices = [first + 3 * number for number in range(len(documents))]
    blocks = blocks_of(numbered, indices, chunk_size=chunk_size, block_size=chunk_size * chunks, seed=seed)
    stream = blocks["input_ids"].ravel()
    offsets = [int(np.flatnonzero(stream == number + 2)[0]) % chunk_size for number in range(len(documents))]
    assert offsets == [offset_of(index, chunk_size, seed) for index in indices]


@pytest.mark.parametrize("chunk_size", [2, 4, 8])
def test_offsets_of_two_seeds_agree_by_chance_only(chunk_size):
    num, share = 900, 1 / chunk_size
    first, second = ([offset_of(100 + i, chunk_size, seed) for i in range(num)] for seed in (0, 1))
    equal = sum(a == b for a, b in zip(first, second, strict=True))
    assert abs(equal - num * share) < 5 * (num * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("block_size", [6, 4, 0, 7, 3])
def test_bad_block_sizes_are_refused(block_size):
    message = rf"multiple of the chunk size 4.*at least 2 chunks, got {block_size} tokens"
    with pytest.raises(InputError, match=message):
        check_block_size(block_size, 4)
    with pytest.raises(InputError, match=message):
        blocks_of([[5]], chunk_size=4, block_size=block_size)


@pytest.mark.parametrize("block_size", [8, 12])
def test_good_block_sizes_are_accepted(block_size):
    check_block_size(block_size, 4)
