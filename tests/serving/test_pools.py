"""A pool is drawn between the steps of the texts, for as long as somebody waits for it."""

import copy
import json
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from serving_client import PROMPT, alone, serving, slowed, wait_until
from tiny import EOS, HEADS, tiny_model

from calm.core.random import generators_of_rows
from calm.core.temperature import distribution_of_pool, sample_from_pool
from calm.models.calm import CalmForCausalLM
from calm.text.chat import encode_chat

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
POOL = {"model": "tiny", "prompt": [5, 6, 7, 8], "num_draws": 200, "seed": 3, "most": 1000}


def pool_of(url, **changes):
    body = {"model": "tiny", "prompt": "Once upon", "num_draws": 64, "seed": 1, **changes}
    return httpx.post(f"{url}/v1/calm/pool", json=body, timeout=30)


def test_a_pool_is_what_the_head_draws(server, model, tokenizer):
    """The counts of draws behind the prompt and what was written, and the distribution of the pool rule."""
    _, _, url = server
    ids = tokenizer("Once upon")["input_ids"]
    written = [7, 8, 9, 10]
    pool = pool_of(url, written=written, temperatures=[1.0, 0.5, 0.0], num_draws=1000, most=1000).json()
    counts = [candidate["count"] for candidate in pool["candidates"]]
    assert sum(counts) == 1000 == pool["num_draws"] and pool["num_different"] == len(counts)
    assert counts == sorted(counts, reverse=True)
    for place, temperature in enumerate(pool["temperatures"]):
        distribution = distribution_of_pool(torch.tensor(counts), temperature)
        assert [c["chances"][place] for c in pool["candidates"]] == pytest.approx(distribution.tolist())
    front = -len(ids) % 4
    padded = torch.tensor([[0] * front + ids + written])
    mask = (torch.arange(padded.shape[1]) >= front).long().unsqueeze(0)
    hidden = model.hidden_states_of_chunks(padded, mask)[:, -1]
    drawn = Counter(map(tuple, model.draw_chunks(hidden, 4000)[:, 0].tolist()))
    for candidate in pool["candidates"][:3]:  # Standard errors of about 1.5%.
        share = drawn[tuple(candidate["token_ids"])] / 4000
        assert candidate["count"] / 1000 == pytest.approx(share, abs=0.07)


def test_the_distribution_of_a_pool_is_that_of_its_sampler():
    counts = torch.tensor([9, 5, 3, 2, 1])
    pool = torch.arange(5).repeat_interleave(counts).reshape(-1, 1, 1)
    for settings in ({"temperature": 0.5}, {"temperature": 0.4}, {"temperature": 1, "top_p": 0.6},
                     {"temperature": 0.7, "min_p": 0.3}, {"temperature": 0.0}):  # fmt: skip
        distribution = distribution_of_pool(counts, **settings)
        assert distribution.sum() == pytest.approx(1)
        generator = torch.Generator().manual_seed(0)
        wide = pool.expand(-1, 20_000, -1)
        chosen = sample_from_pool(wide, randomness=generator, **settings).chunks_RK.flatten()
        shares = torch.bincount(chosen, minlength=5) / 20_000
        assert (shares - distribution).abs().max() < 0.015


@pytest.mark.parametrize(("limits", "number"), [({}, 200), ({"max_draws": 50}, 50), ({"draws": 30}, 30)])
def test_as_many_draws_as_the_server_makes_where_a_request_says_none(limits, number, model, tokenizer):
    with serving(model, tokenizer, **limits) as (_, _, url):
        assert pool_of(url, num_draws=None).json()["num_draws"] == number


BAD = {
    "draws": ({"num_draws": 5000}, "must be at most 1000"),
    "few draws": ({"num_draws": 1, "temperatures": [0.5]}, "needs at least 2 draws"),
    "no end of draws": ({"temperatures": [1e-300]}, "of 1e-300 needs 1e+300 draws, got 64"),
    "temperature": ({"temperatures": [2.0]}, "between 0 and 1"),
    "written": ({"written": [5]}, "whole chunks of 4"),
    "ids": ({"prompt": [999]}, "token ids in 'prompt'"),
    "ids after": ({"written": [5, 6, 7, 999]}, "token ids in 'written'"),
    "not whole": ({"written": [5, 6.5]}, "written[1]: token ids must be whole numbers, got 6.5"),
    "many temperatures": ({"temperatures": [1] * 17}, "may have at most 16 values"),
    "long": ({"prompt": [5] * 256}, "no room for another chunk"),
    "nothing to follow": ({"prompt": None}, "either 'prompt' or 'messages'"),
    "two to follow": ({"messages": MESSAGES}, "either 'prompt' or 'messages'"),
    "no messages": ({"prompt": None, "messages": []}, "messages"),
    "half a chunk": ({"chunk": [5, 6]}, "'chunk' must have 4 tokens, or fewer if it ends with an EOS token"),
    "tokens behind the end": ({"chunk": [5, EOS, 6, 7]}, "no tokens may follow the end"),
    "two chunks": ({"chunk": [5] * 8}, "'chunk' must have 4 tokens"),
    "ids of the chunk": ({"chunk": [5, 6, 7, 999]}, "token ids in 'chunk'"),
    "words for a chunk": ({"chunk": "a"}, "chunk: must be an array of token ids"),
    "unknown": ({"color": 1}, "there is no argument 'color'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_pools(changes, message, server):
    _, _, url = server
    answer = pool_of(url, **changes)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


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


def up_to_end(chunk):
    return tuple(chunk[: chunk.index(EOS) + 1] if EOS in chunk else chunk)


@pytest.mark.parametrize("head_type", HEADS)
def test_slices_are_the_draws_of_all_at_once(head_type, tokenizer):
    model = tiny_model(4, vocab_size=320, head_config={"head_type": head_type})
    hidden = model.hidden_states_of_chunks(torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long))
    drawn = model.draw_chunks(hidden[:, -1], 200, generators_of_rows(3, [[5, 6, 7, 8]]))
    with serving(model, tokenizer) as (_, _, url):
        answer = httpx.post(f"{url}/v1/calm/pool", json=POOL, timeout=60).json()
    counts = Counter({tuple(one["token_ids"]): one["count"] for one in answer["candidates"]})
    assert counts == Counter(map(up_to_end, drawn[:, 0].tolist()))


def test_texts_go_on_between_slices(model, tokenizer, slow_draws, monkeypatch):
    slowed(monkeypatch, 0.03)  # Or the text may be over before the pool begins.
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
        wait_until(lambda: engine.num_tasks == 0)
        assert len(slow_draws) < 10


def test_a_client_that_leaves_ends_its_pools(model, tokenizer, slow_draws):
    body = json.dumps(POOL | {"num_draws": 1000}).encode()
    head = f"POST /v1/calm/pool HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    with serving(model, tokenizer) as (engine, client, url):
        port = int(url.rsplit(":", 1)[1])
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        for connection in connections:
            connection.sendall(head.encode() + body)
        wait_until(lambda: engine.num_tasks == 5)
        for connection in connections:
            connection.close()
        wait_until(lambda: engine.num_tasks == 0)
        assert len(slow_draws) < 40  # Of 80.
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text


def test_too_many_pools(model, tokenizer, slow_draws):
    with serving(model, tokenizer, max_waiting=1) as (engine, _, url), ThreadPoolExecutor(4) as threads:
        ask = lambda _: httpx.post(f"{url}/v1/calm/pool", json=POOL, timeout=30).status_code  # noqa: E731
        statuses = list(threads.map(ask, range(4)))
        assert set(statuses) == {200, 429}
        wait_until(lambda: engine.num_tasks == 0)


def test_a_pool_that_fails_is_nobody_elses_matter(model, tokenizer, monkeypatch):
    with serving(model, tokenizer) as (engine, client, url):
        slowed(monkeypatch, 0.01)
        monkeypatch.setattr(CalmForCausalLM, "draw_chunks", lambda *_: 1 / 0)
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, seed=1, temperature=1, stream=True
        )
        answer = httpx.post(f"{url}/v1/calm/pool", json=POOL, timeout=30)
        assert answer.status_code == 500 and "in the server log" in answer.json()["error"]["message"]
        expected = alone(model, tokenizer, PROMPT, max_new_tokens=40, seed=1, temperature=1.0)
        assert "".join(event.choices[0].text for event in stream) == expected
        assert engine.num_tasks == 0


def test_a_pool_after_messages_follows_what_the_template_writes(server, tokenizer):
    """Also after chunks of the answer; the same tokens as a prompt give the same draws."""
    _, _, url = server
    ids = encode_chat(tokenizer, MESSAGES)
    for written in ([], [7, 8, 9, 10]):
        pool = pool_of(url, prompt=None, messages=MESSAGES, written=written).json()
        assert pool == pool_of(url, prompt=ids, written=written).json()
        assert pool["num_draws"] == 64


def test_messages_that_are_too_long_or_have_no_template(model, tokenizer):
    long = [{"role": "user", "content": "a" * 10**5}]
    with serving(model, tokenizer) as (_, _, url):
        assert "cannot fit" in pool_of(url, prompt=None, messages=long).json()["error"]["message"]
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with serving(model, bare) as (_, _, url):
        assert "no chat template" in pool_of(url, prompt=None, messages=MESSAGES).json()["error"]["message"]


def test_a_chunk_is_told_however_rare(server):
    _, _, url = server
    first = pool_of(url, most=1, temperatures=[1.0, 0.5]).json()
    rare = pool_of(url, most=1000).json()["candidates"][-1]["token_ids"]
    never = [319, 318, 317, 316]
    for chunk, count in ((first["candidates"][0]["token_ids"], None), (rare, 1), (never, 0), ([EOS], 0)):
        pool = pool_of(url, most=1, temperatures=[1.0, 0.5], chunk=chunk).json()
        assert pool["candidates"][0] == first["candidates"][0]
        if count is None:
            assert len(pool["candidates"]) == 1
            continue
        told = pool["candidates"][1]
        assert told["token_ids"] == chunk and told["count"] == count
        assert told["chances"][0] == pytest.approx(count / 64)


def test_draws_that_differ_behind_the_end_only_are_one(model, tokenizer, monkeypatch):
    """The pool rule sees them as they were drawn, as in sampling."""
    draws = [[5, EOS, 6, 6]] * 3 + [[5, EOS, 7, 7]] * 2 + [[5, 6, 7, 8]] * 4
    drawn = torch.tensor(draws).unsqueeze(1)
    monkeypatch.setattr(CalmForCausalLM, "draw_chunks", lambda self, states, number, _: drawn[:number])
    with serving(model, tokenizer) as (_, _, url):
        pool = pool_of(url, num_draws=9, temperatures=[1.0, 0.5, 0.0]).json()
    assert pool["num_different"] == 2
    told = {tuple(one["token_ids"]): (one["count"], one["chances"]) for one in pool["candidates"]}
    assert told[5, EOS] == (5, pytest.approx([5 / 9, 4 / 10, 0]))  # Pairs: 3 + 1 of 3 + 1 + 6.
    assert told[5, 6, 7, 8] == (4, pytest.approx([4 / 9, 6 / 10, 1]))


def test_a_head_with_a_likelihood_tells_probabilities(tokenizer):
    """They are the shares of its own draws at the temperature; at 0 of the one chunk that it writes."""
    torch.manual_seed(0)
    model = tiny_model(2, vocab_size=320, head_config={"head_type": "sequential"})
    temperatures = [1.0, 0.3, 0.0]
    with torch.no_grad():
        model.head.scores.bias.copy_(torch.linspace(0, 30, 320))  # So that some chunks are frequent.
        model.head.scores.bias[EOS] = 35.0
    with serving(model, tokenizer) as (_, _, url):
        pool = pool_of(url, temperatures=temperatures, prompt=[5, 6, 7, 8]).json()
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    prepared = model.head.prepare(model.hidden_states_of_chunks(ids, mask)[:, -1])
    generator = torch.Generator().manual_seed(1)
    assert any(one["token_ids"] == [EOS] for one in pool["candidates"])
    for place, temperature in enumerate(temperatures):
        draws = model.head.draw_chunks(prepared, 20_000, generator, temperature)[:, 0].tolist()
        shares = Counter(map(up_to_end, draws))
        for one in pool["candidates"]:
            expected = shares[tuple(one["token_ids"])] / 20_000
            assert one["probabilities"][place] == pytest.approx(expected, abs=0.015)


def test_other_heads_tell_none(server):
    _, _, url = server
    assert not any("probabilities" in one for one in pool_of(url).json()["candidates"])
