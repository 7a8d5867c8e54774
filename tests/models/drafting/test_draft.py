"""Drafts of a growing text, which is read on in K alignments, against those of a fresh drafter."""

import pytest
import torch
from drafts import drafting_model
from tiny import BOS, EOS
from torch.testing import assert_close

from calm.models.drafting.draft import ChunkDrafter

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")
HEADS = ["sequential", "classes", "energy", "categorical_flow", "decoder", "parallel"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def growing_text(lengths):
    """Yield a text that grows by these numbers of tokens."""
    generator, text = seeded(5), [BOS]
    for length in lengths:
        yield list(text)
        text += torch.randint(3, 40, (length,), generator=generator).tolist()


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 2, 4])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_drafts_of_a_growing_text_match_those_of_a_fresh_drafter(head_type, chunk_size, num_chunks):
    # It grows by one token, by more than a chunk, and by so many that they are read in one pass.
    model = drafting_model(head_type, chunk_size, backbone_config={"max_position_embeddings": 128})
    drafter = ChunkDrafter(model, num_chunks=num_chunks)
    for text in growing_text([1, 1, 2, 3, 1, 4, 5, 1, 24, 1, 1, 1, 1, 2]):
        draft = drafter.draft(text, 99, seeded())
        fresh = ChunkDrafter(model, num_chunks=num_chunks).draft(text, 99, seeded())
        assert draft.branches == fresh.branches
        assert draft.branches.is_line
        assert len(draft.branches) == chunk_size * num_chunks or draft.branches.tokens_G[-1] == EOS
        if head_type in ("sequential", "classes"):
            last = len(draft.branches) - 2
            assert_close(draft.distribution_at(last), fresh.distribution_at(last), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [1, 4, 5, 7])
def test_greedy_draft_matches_generate(length):
    model = drafting_model()
    text = list(growing_text([length, 1]))[1]
    tokens = ChunkDrafter(model, temperature=0.0, num_chunks=2).draft(text, 99).branches.tokens_G
    generated = model.generate(torch.tensor([text]), max_new_tokens=8, temperature=0.0, seed=0)
    assert tokens == generated[0, len(text) :].tolist()[: len(tokens)]


def test_energy_heads_and_greedy_drafts_report_no_distribution():
    for head_type, temperature in (("energy", 1.0), ("energy", 0.0), ("sequential", 0.0)):
        draft = ChunkDrafter(drafting_model(head_type), temperature).draft([BOS], 4, seeded())
        assert draft.distribution_at is None


@pytest.mark.parametrize("temperature", [0.0, 0.005, 0.02, 0.3, 0.999, 1.0, 1.7])
@pytest.mark.parametrize("head_type", HEADS)
def test_drafts_at_any_temperature(head_type, temperature):
    draft = ChunkDrafter(drafting_model(head_type), temperature).draft([BOS, 5, 6], 4, seeded())
    assert 1 <= len(draft.branches) <= 4


def test_drafts_respect_the_maximum_length():
    drafter = ChunkDrafter(drafting_model(), num_chunks=3)
    for max_length in range(6):
        draft = drafter.draft([BOS, 5, 6], max_length, seeded())
        assert len(draft.branches) <= max_length


def test_draft_stops_at_eos():
    model = drafting_model()
    with torch.no_grad():
        model.head.scores.bias[EOS] = 100.0
    draft = ChunkDrafter(model, num_chunks=3).draft([BOS, 5, 6], 99, seeded())
    assert list(draft.branches.tokens_G) == [EOS]


def test_nothing_is_drafted_once_the_context_is_full():
    model = drafting_model()  # Its context is 64 chunks of 4 tokens.
    text = [BOS] + [5] * 259
    assert ChunkDrafter(model).draft(text[:255], 4, seeded()).branches.tokens_G
    assert not ChunkDrafter(model, num_chunks=2).draft(text[:255], 8, seeded()).branches.tokens_G
    assert ChunkDrafter(model, num_chunks=2).draft(text[:250], 8, seeded()).branches.tokens_G
    assert not ChunkDrafter(model).draft(text[:257], 4, seeded()).branches.tokens_G
