"""A small trained tokenizer."""

import pytest

from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(stories(0, 20), 320)
