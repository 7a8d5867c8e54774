"""Pools of draws for the next chunk, drawn between generation steps while a client waits for them."""

import copy
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from serving_client import PROMPT, connect, generate_text, serving, slow_down_steps, wait_until
from tiny import EOS, HEADS, tiny_model

from calm.core.random import generators_of_rows
from calm.core.temperature import distribution_of_pool, sample_from_pool
from calm.models.calm import CalmForCausalLM
from calm.text.chat import encode_chat

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
REQUEST = {"model": "tiny", "prompt": [5, 6, 7, 8], "num_draws": 200, "seed": 3, "most": 1000}


def request_pool(url, **changes):
    body = {"model": "tiny", "prompt": "Once upon", "num_draws": 64, "seed": 1, **changes}
    return httpx.post(f"{url}/v1/calm/pool", json=body, timeout=30)


def test_pool_has_the_distribution_of_the_head(server, model, tokenizer):
    """Counts match direct draws after the prompt and the written chunks; chances, the rule of pools."""
    _, _, url = server
    ids = tokenizer("Once upon")["input_ids"]
    written = [7, 8, 9, 10]
    pool = request_pool(url, written=written, temperatures=[1.0, 0.5, 0.0], num_draws=1000, most=1000).json()
    counts = [candidate["count"] for candidate in pool["candidates"]]
    assert sum(counts) == 1000 == pool["num_draws"] and pool["num_different"] == len(counts)
    assert counts == sorted(counts, reverse=True)
    for index, temperature in enumerate(pool["temperatures"]):
        distribution = distribution_of_pool(torch.tensor(counts), temperature)
        assert [c["chances"][index] for c in pool["candidates"]] == pytest.approx(distribution.tolist())
    num_padding = -len(ids) % 4
    padded = torch.tensor([[0] * num_padding + ids + written])
    mask = (torch.arange(padded.shape[1]) >= num_padding).long().unsqueeze(0)
    hidden = model.hidden_states_of_chunks(padded, mask)[:, -1]
    drawn = Counter(map(tuple, model.draw_chunks(hidden, 4000)[:, 0].tolist()))
    for candidate in pool["candidates"][:3]:  # Standard errors of about 1.5%.
        share = drawn[tuple(candidate["token_ids"])] / 4000
        assert candidate["count"] / 1000 == pytest.approx(share, abs=0.07)


def test_distribution_of_a_pool_matches_its_sampler():
    counts = torch.tensor([9, 5, 3, 2, 1])
    pool = torch.arange(5).repeat_interleave(counts).reshape(-1, 1, 1)
    for settings in ({"temperature": 0.5}, {"temperature": 0.4}, {"temperature": 1, "top_p": 0.6},
                     {"temperature": 0.7, "min_p": 0.3}, {"temperature": 0.0}):  # fmt: skip
        distribution = distribution_of_pool(counts, **settings)
        assert distribution.sum() == pytest.approx(1)
        generator = torch.Generator().manual_seed(0)
        pools = pool.expand(-1, 20_000, -1)
        chosen = sample_from_pool(pools, randomness=generator, **settings).chunks_RK.flatten()
        shares = torch.bincount(chosen, minlength=5) / 20_000
        assert (shares - distribution).abs().max() < 0.015


@pytest.mark.parametrize(("limits", "number"), [({}, 200), ({"max_draws": 50}, 50), ({"draws": 30}, 30)])
def test_number_of_draws_defaults_to_that_of_the_server(limits, number, model, tokenizer):
    with serving(model, tokenizer, **limits) as (_, _, url):
        assert request_pool(url, num_draws=None).json()["num_draws"] == number


INVALID = {
    "draws": ({"num_draws": 5000}, "must be at most 1000"),
    "few draws": ({"num_draws": 1, "temperatures": [0.5]}, "needs at least 2 draws"),
    "a temperature next to 0": ({"temperatures": [1e-300]}, "of 1e-300 needs 1e+300 draws, got 64"),
    "temperature": ({"temperatures": [2.0]}, "between 0 and 1"),
    "written": ({"written": [5]}, "whole chunks of 4"),
    "ids": ({"prompt": [999]}, "token ids in 'prompt'"),
    "ids after": ({"written": [5, 6, 7, 999]}, "token ids in 'written'"),
    "not whole": ({"written": [5, 6.5]}, "written[1]: token ids must be whole numbers, got 6.5"),
    "many temperatures": ({"temperatures": [1] * 17}, "may have at most 16 values"),
    "long": ({"prompt": [5] * 256}, "no room for another chunk"),
    "neither prompt nor messages": ({"prompt": None}, "either 'prompt' or 'messages'"),
    "prompt and messages": ({"messages": MESSAGES}, "either 'prompt' or 'messages'"),
    "no messages": ({"prompt": None, "messages": []}, "messages"),
    "half a chunk": ({"chunk": [5, 6]}, "'chunk' must have 4 tokens, or fewer if it ends with an EOS token"),
    "tokens after EOS": ({"chunk": [5, EOS, 6, 7]}, "no tokens may follow the end"),
    "two chunks": ({"chunk": [5] * 8}, "'chunk' must have 4 tokens"),
    "ids of the chunk": ({"chunk": [5, 6, 7, 999]}, "token ids in 'chunk'"),
    "words for a chunk": ({"chunk": "a"}, "chunk: must be an array of token ids"),
    "unknown": ({"color": 1}, "there is no argument 'color'"),
}


@pytest.mark.parametrize(("changes", "message"), INVALID.values(), ids=INVALID)
def test_invalid_requests_are_refused(changes, message, server):
    _, _, url = server
    response = request_pool(url, **changes)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


@pytest.fixture
def slow_draws(monkeypatch):
    """Every slice of a pool's draws takes 0.05 s longer; the sizes of the slices."""
    slices, draw = [], CalmForCausalLM.draw_chunks

    def slow_draw(self, *arguments):
        slices.append(arguments[1])
        time.sleep(0.05)
        return draw(self, *arguments)

    monkeypatch.setattr(CalmForCausalLM, "draw_chunks", slow_draw)
    return slices


def through_eos(chunk):
    """The tokens of a chunk up to its first EOS, included."""
    return tuple(chunk[: chunk.index(EOS) + 1] if EOS in chunk else chunk)


@pytest.mark.parametrize("head_type", HEADS)
def test_slices_give_the_same_draws_as_one_call(head_type, tokenizer):
    model = tiny_model(4, vocab_size=320, head_config={"head_type": head_type})
    hidden = model.hidden_states_of_chunks(torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long))
    drawn = model.draw_chunks(hidden[:, -1], 200, generators_of_rows(3, [[5, 6, 7, 8]]))
    with serving(model, tokenizer) as (_, _, url):
        response = httpx.post(f"{url}/v1/calm/pool", json=REQUEST, timeout=60).json()
    counts = Counter(
        {tuple(candidate["token_ids"]): candidate["count"] for candidate in response["candidates"]}
    )
    assert counts == Counter(map(through_eos, drawn[:, 0].tolist()))


def test_texts_advance_between_slices(model, tokenizer, slow_draws, monkeypatch):
    slow_down_steps(monkeypatch, 0.03)  # Otherwise the text may end before the pool begins.
    with serving(model, tokenizer) as (engine, client, url), ThreadPoolExecutor(1) as threads:
        text = threads.submit(
            client.completions.create, model="tiny", prompt=PROMPT, max_tokens=40, seed=1, temperature=1
        )
        wait_until(lambda: engine.num_rows == 1)
        assert (
            httpx.post(f"{url}/v1/calm/pool", json=REQUEST | {"num_draws": 640}, timeout=30).status_code
            == 200
        )
        assert max(slow_draws) <= 64 and len(slow_draws) == 10
        assert engine.statistics.steps == 10
        expected = generate_text(model, tokenizer, PROMPT, max_new_tokens=40, seed=1, temperature=1.0)
        assert text.result().choices[0].text == expected


def test_pool_past_its_time_limit_is_given_up(model, tokenizer, slow_draws):
    with serving(model, tokenizer, seconds=0.12) as (engine, _, url):
        response = httpx.post(f"{url}/v1/calm/pool", json=REQUEST | {"num_draws": 1000}, timeout=30)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        wait_until(lambda: engine.num_tasks == 0)
        assert len(slow_draws) < 10


def test_disconnect_cancels_pools(model, tokenizer, slow_draws):
    body = json.dumps(REQUEST | {"num_draws": 1000}).encode()
    head = f"POST /v1/calm/pool HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    with serving(model, tokenizer) as (engine, client, url):
        connections = [connect(url) for _ in range(5)]
        for connection in connections:
            connection.sendall(head.encode() + body)
        wait_until(lambda: engine.num_tasks == 5)
        for connection in connections:
            connection.close()
        wait_until(lambda: engine.num_tasks == 0)
        assert len(slow_draws) < 40  # Of 80.
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text


def test_number_of_waiting_pools_is_limited(model, tokenizer, slow_draws):
    with serving(model, tokenizer, max_waiting=1) as (engine, _, url), ThreadPoolExecutor(4) as threads:

        def status(_):
            return httpx.post(f"{url}/v1/calm/pool", json=REQUEST, timeout=30).status_code

        statuses = list(threads.map(status, range(4)))
        assert set(statuses) == {200, 429}
        wait_until(lambda: engine.num_tasks == 0)


def test_failing_pool_does_not_affect_texts(model, tokenizer, monkeypatch):
    with serving(model, tokenizer) as (engine, client, url):
        slow_down_steps(monkeypatch, 0.01)
        monkeypatch.setattr(CalmForCausalLM, "draw_chunks", lambda *_: 1 / 0)
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, seed=1, temperature=1, stream=True
        )
        response = httpx.post(f"{url}/v1/calm/pool", json=REQUEST, timeout=30)
        assert response.status_code == 500 and "in the server log" in response.json()["error"]["message"]
        expected = generate_text(model, tokenizer, PROMPT, max_new_tokens=40, seed=1, temperature=1.0)
        assert "".join(event.choices[0].text for event in stream) == expected
        assert engine.num_tasks == 0


def test_pool_after_messages_equals_pool_after_their_tokens(server, tokenizer):
    """Also after chunks of the reply."""
    _, _, url = server
    ids = encode_chat(tokenizer, MESSAGES)
    for written in ([], [7, 8, 9, 10]):
        pool = request_pool(url, prompt=None, messages=MESSAGES, written=written).json()
        assert pool == request_pool(url, prompt=ids, written=written).json()
        assert pool["num_draws"] == 64


def test_overlong_messages_and_missing_templates_are_refused(model, tokenizer):
    long = [{"role": "user", "content": "a" * 10**5}]
    with serving(model, tokenizer) as (_, _, url):
        assert "cannot fit" in request_pool(url, prompt=None, messages=long).json()["error"]["message"]
    without_template = copy.deepcopy(tokenizer)
    without_template.chat_template = None
    with serving(model, without_template) as (_, _, url):
        error = request_pool(url, prompt=None, messages=MESSAGES).json()["error"]
        assert "no chat template" in error["message"]


def test_requested_chunk_is_reported_however_rare(server):
    _, _, url = server
    first = request_pool(url, most=1, temperatures=[1.0, 0.5]).json()
    rare = request_pool(url, most=1000).json()["candidates"][-1]["token_ids"]
    undrawn = [319, 318, 317, 316]
    for chunk, count in ((first["candidates"][0]["token_ids"], None), (rare, 1), (undrawn, 0), ([EOS], 0)):
        pool = request_pool(url, most=1, temperatures=[1.0, 0.5], chunk=chunk).json()
        assert pool["candidates"][0] == first["candidates"][0]
        if count is None:
            assert len(pool["candidates"]) == 1
            continue
        requested = pool["candidates"][1]
        assert requested["token_ids"] == chunk and requested["count"] == count
        assert requested["chances"][0] == pytest.approx(count / 64)


def test_draws_that_differ_only_after_eos_are_merged(model, tokenizer, monkeypatch):
    """The rule of pools counts them separately, as they were drawn, as in sampling."""
    draws = [[5, EOS, 6, 6]] * 3 + [[5, EOS, 7, 7]] * 2 + [[5, 6, 7, 8]] * 4
    drawn = torch.tensor(draws).unsqueeze(1)
    monkeypatch.setattr(CalmForCausalLM, "draw_chunks", lambda self, states, number, _: drawn[:number])
    with serving(model, tokenizer) as (_, _, url):
        pool = request_pool(url, num_draws=9, temperatures=[1.0, 0.5, 0.0]).json()
    assert pool["num_different"] == 2
    reported = {
        tuple(candidate["token_ids"]): (candidate["count"], candidate["chances"])
        for candidate in pool["candidates"]
    }
    assert reported[5, EOS] == (5, pytest.approx([5 / 9, 4 / 10, 0]))  # Pairs: 3 + 1 of 3 + 1 + 6.
    assert reported[5, 6, 7, 8] == (4, pytest.approx([4 / 9, 6 / 10, 1]))


def test_head_with_a_likelihood_reports_probabilities(tokenizer):
    """They match the shares of its own draws at each temperature; at 0 there is a single chunk."""
    torch.manual_seed(0)
    model = tiny_model(2, vocab_size=320, head_config={"head_type": "sequential"})
    temperatures = [1.0, 0.3, 0.0]
    with torch.no_grad():
        model.head.scores.bias.copy_(torch.linspace(0, 30, 320))  # So that some chunks are frequent.
        model.head.scores.bias[EOS] = 35.0
    with serving(model, tokenizer) as (_, _, url):
        pool = request_pool(url, temperatures=temperatures, prompt=[5, 6, 7, 8]).json()
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    prepared = model.head.prepare(model.hidden_states_of_chunks(ids, mask)[:, -1])
    generator = torch.Generator().manual_seed(1)
    assert any(candidate["token_ids"] == [EOS] for candidate in pool["candidates"])
    for index, temperature in enumerate(temperatures):
        draws = model.head.draw_chunks(prepared, 20_000, generator, temperature)[:, 0].tolist()
        shares = Counter(map(through_eos, draws))
        for candidate in pool["candidates"]:
            expected = shares[tuple(candidate["token_ids"])] / 20_000
            assert candidate["probabilities"][index] == pytest.approx(expected, abs=0.015)


def test_other_heads_report_no_probabilities(server):
    _, _, url = server
    assert not any("probabilities" in candidate for candidate in request_pool(url).json()["candidates"])
