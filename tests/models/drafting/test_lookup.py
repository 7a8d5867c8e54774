"""Prompt lookup: drafts copied from the text, against a search from its end."""

import pytest
import torch
from drafts import deciding_model, distribution_of_texts, drafting_model, p_value

from calm.models.drafting.draft import ChunkDrafter
from calm.models.drafting.generate import Drafting
from calm.models.drafting.lookup import INITIAL_LENGTH, MAX_LENGTH, Lookup
from calm.models.drafting.text import DraftedText

pytestmark = pytest.mark.usefixtures("norms_in_double_precision")


def search_from_the_end(text, length, max_length):
    """What followed the latest earlier occurrence of the last `length` tokens."""
    for end in range(len(text) - 1, length - 1, -1):
        if text[end - length : end] == text[-length:]:
            repeated = text[end:] * INITIAL_LENGTH
            return repeated[: min(max_length, INITIAL_LENGTH)]
    return []


@pytest.mark.parametrize("length", [1, 2, 3])
def test_latest_occurrence_is_found_in_a_growing_text(length):
    generator, lookup, text, num_found = torch.Generator().manual_seed(length), Lookup(length), [], 0
    for _ in range(200):
        text += torch.randint(
            4, (int(torch.randint(1, 4, (1,), generator=generator)),), generator=generator
        ).tolist()
        max_length = int(torch.randint(1, 14, (1,), generator=generator))
        expected = search_from_the_end(text, length, max_length) if len(text) >= length else []
        assert list(lookup.draft(text, max_length)) == expected
        num_found += bool(expected)
    assert num_found > 100


def test_repetition_is_continued_to_the_full_length():
    assert Lookup(2).draft([1, 2, 3, 1, 2], 8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert Lookup(1).draft([4, 4], 3) == [4, 4, 4]


def test_copies_double_in_length_while_fully_accepted():
    lookup, text, lengths = Lookup(2), [1, 2, 3, 1, 2], []
    for index in range(7):
        copied = list(lookup.draft(text, 99))
        lengths.append(len(copied))
        text += copied if index != 4 else copied[:5]  # The fifth is accepted in part.
        text.append(text[-3])
    first, last = INITIAL_LENGTH, MAX_LENGTH
    assert lengths == [first, 2 * first, last, last, last, first, 2 * first]


def test_nothing_is_copied_if_disabled_or_without_an_occurrence():
    assert Lookup(0).draft([1, 1, 1, 1], 5) == ()
    assert Lookup(3).draft([1, 2], 5) == ()
    assert Lookup(2).draft([1, 2, 3, 4], 5) == ()


def test_repetitive_text_takes_fewer_rounds_and_stays_the_same():
    model, draft = deciding_model(), drafting_model()
    settings = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
    rounds = {}
    for lookup in (0, 2):
        rounds[lookup] = 0
        for prompt in ([1, 5, 6, 7, 8, 5, 6, 7], [1, 9], [1, 4, 4, 4]):
            prompt_1T = torch.tensor([prompt])
            output = model.generate(prompt_1T, custom_generate=Drafting(draft, lookup=lookup), **settings)
            undrafted = model.generate(prompt_1T, max_new_tokens=60, do_sample=False)
            assert output.sequences.tolist() == undrafted.tolist()
            rounds[lookup] += output.num_rounds
    assert rounds[2] < 0.9 * rounds[0]


def test_copied_drafts_do_not_change_the_distribution():
    model, draft = deciding_model(5), drafting_model(chunk_size=2, vocab_size=5)
    prompt, generator, texts, num_copied = [1, 3, 4, 3, 4, 3], torch.Generator().manual_seed(0), [], 0
    for _ in range(700):
        drafter = ChunkDrafter(draft, lookup=2)
        num_copied += drafter.draft(prompt, 2, generator).distribution_at is None
        text = DraftedText(model, drafter, torch.tensor([prompt]), generator=generator)
        while (remaining := len(prompt) + 3 - text.ids_1T.shape[1]) > 0:
            text.run_round(remaining)
        texts.append(tuple(text.ids_1T[0, len(prompt) :].tolist()))
    assert num_copied == 700
    assert p_value(texts, distribution_of_texts(model, prompt, 3)) > 1e-3


def test_negative_lookup_is_refused():
    with pytest.raises(ValueError, match="lookup must be at least 0, got -1"):
        Drafting(drafting_model(), lookup=-1)
