"""A small model that is served, and a browser if there is one."""

import pytest
import torch
from browser import chromium_if_any
from serving_client import serving
from tiny import tiny_model

from calm.data.examples import set_chat_template
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = train_tokenizer(stories(0, 20), 320)
    set_chat_template(tokenizer, None)
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


@pytest.fixture(scope="module")
def chromium():
    with chromium_if_any() as browser:
        yield browser


@pytest.fixture
def visit(chromium):
    """A function that opens the page; the test fails if the page reports an error."""
    contexts, problems = [], []

    def visit(url, **options):
        context = chromium.new_context(**options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if is_problem(message) else None)
        page.goto(url)
        page.wait_for_selector("#model:not(:empty)")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def is_problem(message):
    """Whether a console message is an error; browsers also log every request that is refused."""
    return message.type == "error" and "Failed to load resource" not in message.text
