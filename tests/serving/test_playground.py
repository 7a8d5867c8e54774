"""The page at / over HTTP: what it is made of, and what it is told of the model."""

import re

import httpx
import pytest
from serving_client import serving
from tiny import EOS, HEADS, tiny_model

from calm.serving.playground import PAGE_PATHS


def parts_of(url):
    """Text of the page and of all that it loads, by path."""
    texts, open_paths = {}, ["/"]
    while open_paths:
        if (path := open_paths.pop()) in texts:
            continue
        answer = httpx.get(url + path)
        assert answer.status_code == 200, path
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        texts[path] = answer.text
        open_paths += re.findall(r'(?:src=|href=|from )"(/[^"]*)"', answer.text)
    return texts


def test_the_page_takes_nothing_from_elsewhere(server):
    _, _, url = server
    texts = parts_of(url)
    assert set(texts) == set(PAGE_PATHS) - {"/page"}, "every part is loaded, and is answered without a key"
    for path, text in texts.items():
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text), path
        assert path != "/" or not re.search(r"<style|style=|<script>|\son\w+=", text), "none is inline"
    assert httpx.get(f"{url}/page/app.py").status_code == 404


def test_without_a_key_the_page_comes_and_nothing_else(model, tokenizer):
    with serving(model, tokenizer, api_key="k") as (_, _, url):
        assert parts_of(url) and httpx.get(f"{url}/page").json()["needs_key"] is True
        assert httpx.get(f"{url}/v1/models").status_code == 401


@pytest.mark.parametrize("head_type", HEADS)
def test_what_the_page_is_told(head_type, tokenizer):
    model = tiny_model(4, vocab_size=320, head_config={"head_type": head_type})
    with serving(model, tokenizer, temperature=0.5, max_tokens=99, draws=50) as (_, _, url):
        about = httpx.get(f"{url}/page").json()
    name = HEADS[head_type]["head_type"]
    lowest = {"sequential": 0.0, "decoder": 0.0, "parallel": 0.0, "categorical_flow": 0.01}.get(name, 1.0)
    assert about == {
        "model": "tiny",
        "needs_key": False,
        "temperature": 0.5,
        "draws": 50,
        "max_draws": 1000,
        "max_tokens": 99,
        "num_thoughts": None,
        "max_thoughts": 64,
        "chunk_size": 4,
        "eos_token_ids": [EOS],
        "head": name,
        "lowest_temperature": lowest,
        "has_chat": True,
    }
