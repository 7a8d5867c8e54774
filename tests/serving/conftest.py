"""A small model for a server."""

import pytest
import torch
from serving_client import serving
from tiny import tiny_model

from calm.data.examples import give_template
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = train_tokenizer(stories(0, 20), 320)
    give_template(tokenizer, None)
    return tokenizer


@pytest.fixture(scope="session")
def model():
    """Random weights: its EOS, which is that of the tokenizer, is hardly ever drawn."""
    torch.manual_seed(4)
    return tiny_model(4, vocab_size=320)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with serving(model, tokenizer) as running:
        yield running
