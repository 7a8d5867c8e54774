"""Chunks, targets, ends of texts and alignment of prompts, on literal examples."""

import pytest
import torch

from calm.core.chunks import align_to_chunks, as_id_tensor, end_after_eos, find_targets, split_into_chunks

PAD, EOS = 0, 1


def test_split_into_chunks():
    assert split_into_chunks(torch.arange(6).unsqueeze(0), 2).tolist() == [[[0, 1], [2, 3], [4, 5]]]
    with pytest.raises(ValueError, match="multiple of the chunk size 4, got 6"):
        split_into_chunks(torch.arange(6).unsqueeze(0), 4)


def test_targets_have_a_label_and_do_not_start_a_document():
    labels = torch.tensor([[5, 6, 7, -100, 8, 9, -100, -100]])
    assert find_targets(labels, None, 2).tolist() == [[True, True, False]]
    assert find_targets(labels, torch.tensor([[0, 1, 0, 1]]), 2).tolist() == [[True, False, False]]


def test_end_after_eos():
    chunks = torch.tensor([[5, EOS, 7, EOS], [5, 6, 7, 8], [5, 6, 7, EOS], [EOS, 9, 9, 9]])
    ended, ends = end_after_eos(chunks, torch.tensor([EOS]), PAD)
    assert ended.tolist() == [[5, EOS, PAD, PAD], [5, 6, 7, 8], [5, 6, 7, EOS], [EOS, PAD, PAD, PAD]]
    assert ends.tolist() == [True, False, True, True]


def test_end_after_one_of_several_eos_or_without_any():
    chunks = torch.tensor([[5, 3, 7, 8]])
    assert end_after_eos(chunks, as_id_tensor([EOS, 3], chunks.device), PAD)[0].tolist() == [[5, 3, PAD, PAD]]
    same, ends = end_after_eos(chunks, as_id_tensor(None, chunks.device), PAD)
    assert same.tolist() == chunks.tolist()
    assert not ends.any()


def test_prompts_move_right_and_padding_goes_in_front():
    prompts = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0], [0, 0, 0, 0, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    tokens, chunk_mask = align_to_chunks(prompts, mask, 4, PAD)
    assert tokens.tolist() == [[0, 0, 0, 5, 6, 7, 8, 9], [0] * 6 + [5, 6], [0] * 7 + [7]]
    assert chunk_mask.tolist() == [[1, 1], [0, 1], [0, 1]]
