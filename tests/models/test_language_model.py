"""What the view of a network makes of odd ones: one sentence, or the text all the same."""

import pytest
import torch
from tiny import tiny_llama, tiny_model

from calm.errors import NotFiniteError
from calm.evaluation.scorers import scorer_of
from calm.models.language_model import language_model

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def overflowing():
    """A Llama whose finite weights give scores that are not."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(1e308)
    return model


def test_a_model_of_tokens_that_overflows_says_so(overflowing):
    with pytest.raises(NotFiniteError, match="probabilities of the next token are not finite"):
        language_model(overflowing).generate(IDS, temperature=0.5, seed=1, max_new_tokens=2)
    reader = scorer_of(overflowing).reader
    with pytest.raises(NotFiniteError, match="probabilities of the next token are not finite"):
        reader.draw(overflowing(IDS).logits[0], 2, torch.Generator())


@pytest.mark.parametrize("has_draft", [False, True])
def test_a_configuration_that_asks_for_more_than_tokens_gives_tokens(has_draft):
    model, draft = tiny_llama(), tiny_model(head_config={"head_type": "sequential"}) if has_draft else None
    how = {"temperature": 0.0, "seed": 1, "max_new_tokens": 6, "draft": draft}
    expected = language_model(model).generate(IDS, **how)
    model.generation_config.return_dict_in_generate = True
    written = language_model(model).generate(IDS, **how)
    assert expected.shape == (1, 10) and torch.equal(written, expected)


def test_a_calm_gives_tokens_as_well():
    model = tiny_model()
    model.generation_config.return_dict_in_generate = True
    assert language_model(model).generate(IDS, temperature=1.0, seed=1, max_new_tokens=4).shape == (1, 8)
