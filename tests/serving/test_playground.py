"""The page at / over HTTP: its files, and what it is told about the model."""

import re

import httpx
import pytest
from serving_client import serving
from tiny import EOS, HEADS, tiny_model

from calm.serving.playground import PAGE_PATHS


def parts_of(url):
    """Text of the page and of everything that it loads, by path."""
    texts, open_paths = {}, ["/"]
    while open_paths:
        if (path := open_paths.pop()) in texts:
            continue
        response = httpx.get(url + path)
        assert response.status_code == 200, path
        assert "default-src 'self'" in response.headers["content-security-policy"]
        texts[path] = response.text
        open_paths += re.findall(r'(?:src=|href=|from )"(/[^"]*)"', response.text)
    return texts


def test_page_loads_nothing_from_other_servers(server):
    _, _, url = server
    texts = parts_of(url)
    assert set(texts) == set(PAGE_PATHS) - {"/page"}, "every file is loaded, and served without a key"
    for path, text in texts.items():
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text), path
        assert path != "/" or not re.search(r"<style|style=|<script>|\son\w+=", text), "nothing is inline"
    assert httpx.get(f"{url}/page/app.py").status_code == 404


def test_page_needs_no_key_but_the_api_does(model, tokenizer):
    with serving(model, tokenizer, api_key="k") as (_, _, url):
        assert parts_of(url) and httpx.get(f"{url}/page").json()["needs_key"] is True
        assert httpx.get(f"{url}/v1/models").status_code == 401


@pytest.mark.parametrize("head_type", HEADS)
def test_page_is_told_about_the_model_and_settings(head_type, tokenizer):
    model = tiny_model(4, vocab_size=320, head_config={"head_type": head_type})
    with serving(model, tokenizer, temperature=0.5, max_tokens=99, draws=50) as (_, _, url):
        facts = httpx.get(f"{url}/page").json()
    name = HEADS[head_type]["head_type"]
    lowest = {"sequential": 0.0, "decoder": 0.0, "parallel": 0.0, "categorical_flow": 0.01}.get(name, 1.0)
    assert facts == {
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
