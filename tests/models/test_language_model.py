"""The interface to language models: overflow is an error, and generation always returns token ids."""

import pytest
import torch
from tiny import tiny_llama, tiny_model

from calm.errors import NotFiniteError
from calm.evaluation.scorers import scorer_of
from calm.models.language_model import language_model

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def overflowing():
    """A Llama whose weights are finite, but not its logits."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(1e308)
    return model


def test_overflow_of_a_token_level_model_is_an_error(overflowing):
    with pytest.raises(NotFiniteError, match="probabilities of the next token are not finite"):
        language_model(overflowing).generate(IDS, temperature=0.5, seed=1, max_new_tokens=2)
    reader = scorer_of(overflowing).reader
    with pytest.raises(NotFiniteError, match="probabilities of the next token are not finite"):
        reader.draw(overflowing(IDS).logits[0], 2, torch.Generator())


@pytest.mark.parametrize("has_draft", [False, True])
def test_generation_returns_tokens_even_if_a_dictionary_is_configured(has_draft):
    model, draft = tiny_llama(), tiny_model(head_config={"head_type": "sequential"}) if has_draft else None
    settings = {"temperature": 0.0, "seed": 1, "max_new_tokens": 6, "draft": draft}
    expected = language_model(model).generate(IDS, **settings)
    model.generation_config.return_dict_in_generate = True
    actual = language_model(model).generate(IDS, **settings)
    assert expected.shape == (1, 10) and torch.equal(actual, expected)


def test_calm_returns_tokens_even_if_a_dictionary_is_configured():
    model = tiny_model()
    model.generation_config.return_dict_in_generate = True
    assert language_model(model).generate(IDS, temperature=1.0, seed=1, max_new_tokens=4).shape == (1, 8)
