"""A pool is drawn between the steps of the texts, for as long as somebody waits for it."""

import json
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from serving_client import PROMPT, alone, serving, slowed, wait_until
from tiny import HEADS, tiny_model

from calm.core.random import generators_of_rows
from calm.models.calm import CalmForCausalLM

POOL = {"model": "tiny", "prompt": [5, 6, 7, 8], "num_draws": 200, "seed": 3, "most": 1000}


@pytest.fixture
def slow_draws(monkeypatch):
    """Draws of a pool take 0.05 s for every slice; how many there were."""
    slices, draw = [], CalmForCausalLM.draw_chunks

    def slow(self, *arguments):
        slices.append(arguments[1])
        time.sleep(0.05)
        return draw(self, *arguments)

    monkeypatch.setattr(CalmForCausalLM, "draw_chunks", slow)
    return slices


@pytest.mark.parametrize("head_type", HEADS)
def test_slices_are_the_draws_of_all_at_once(head_type, tokenizer):
    model = tiny_model(4, vocab_size=320, head_config={"head_type": head_type})
    hidden = model.hidden_states_of_chunks(torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long))
    drawn = model.draw_chunks(hidden[:, -1], 200, generators_of_rows(3, [[5, 6, 7, 8]]))
    with serving(model, tokenizer) as (_, _, url):
        answer = httpx.post(f"{url}/v1/calm/pool", json=POOL, timeout=60).json()
    counts = Counter({tuple(one["token_ids"]): one["count"] for one in answer["candidates"]})
    assert counts == Counter(map(tuple, drawn[:, 0].tolist()))


def test_texts_go_on_between_slices(model, tokenizer, slow_draws):
    with serving(model, tokenizer) as (engine, client, url), ThreadPoolExecutor(1) as threads:
        text = threads.submit(
            client.completions.create, model="tiny", prompt=PROMPT, max_tokens=40, seed=1, temperature=1
        )
        wait_until(lambda: engine.num_rows == 1)
        assert (
            httpx.post(f"{url}/v1/calm/pool", json=POOL | {"num_draws": 640}, timeout=30).status_code == 200
        )
        assert max(slow_draws) <= 64 and len(slow_draws) == 10
        assert engine.statistics.steps == 10
        expected = alone(model, tokenizer, PROMPT, max_new_tokens=40, seed=1, temperature=1.0)
        assert text.result().choices[0].text == expected


def test_a_pool_that_takes_too_long(model, tokenizer, slow_draws):
    with serving(model, tokenizer, seconds=0.12) as (engine, _, url):
        answer = httpx.post(f"{url}/v1/calm/pool", json=POOL | {"num_draws": 1000}, timeout=30)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        wait_until(lambda: engine.num_asked == 0)
        assert len(slow_draws) < 10


def test_a_client_that_leaves_ends_its_pools(model, tokenizer, slow_draws):
    body = json.dumps(POOL | {"num_draws": 1000}).encode()
    head = f"POST /v1/calm/pool HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    with serving(model, tokenizer) as (engine, client, url):
        port = int(url.rsplit(":", 1)[1])
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        for connection in connections:
            connection.sendall(head.encode() + body)
        wait_until(lambda: engine.num_asked == 5)
        for connection in connections:
            connection.close()
        wait_until(lambda: engine.num_asked == 0)
        assert len(slow_draws) < 40  # Of 80.
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text


def test_too_many_pools(model, tokenizer, slow_draws):
    with serving(model, tokenizer, max_waiting=1) as (engine, _, url), ThreadPoolExecutor(4) as threads:
        ask = lambda _: httpx.post(f"{url}/v1/calm/pool", json=POOL, timeout=30).status_code  # noqa: E731
        statuses = list(threads.map(ask, range(4)))
        assert set(statuses) == {200, 429}
        wait_until(lambda: engine.num_asked == 0)


def test_a_pool_that_fails_is_nobody_elses_matter(model, tokenizer, monkeypatch):
    with serving(model, tokenizer) as (engine, client, url):
        slowed(monkeypatch, 0.01)
        monkeypatch.setattr(CalmForCausalLM, "draw_chunks", lambda *_: 1 / 0)
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, seed=1, temperature=1, stream=True
        )
        answer = httpx.post(f"{url}/v1/calm/pool", json=POOL, timeout=30)
        assert answer.status_code == 500 and "its log has more" in answer.json()["error"]["message"]
        expected = alone(model, tokenizer, PROMPT, max_new_tokens=40, seed=1, temperature=1.0)
        assert "".join(event.choices[0].text for event in stream) == expected
        assert engine.num_asked == 0
