"""Every count, length and product of a request is limited, and its work does not delay other requests."""

import asyncio
import inspect
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import httpx
import pytest
from serving_client import PROMPT, connect, generate_text, must_not_run, serving, slow_down_steps, wait_until

from calm.commands.sharing import serve
from calm.serving import app, bodies, endpoint
from calm.serving.errors import ApiError
from calm.serving.intake import Intake
from calm.serving.protocol import CompletionRequest
from calm.serving.settings import ServerSettings
from calm.serving.writers import ChunkWriter
from calm.text.decoding import TextBuilder


def post(url, path="completions", **body):
    body = {"model": "tiny", **body}
    return httpx.post(f"{url}/v1/{path}", content=json.dumps(body), timeout=30)


PART = {"type": "text", "text": "a" * 900_000}
TOO_LONG = {
    "a text": ("completions", {"prompt": "a" * 900_000}),
    "one of several": ("completions", {"prompt": ["a", "b " * 400_000]}),
    "tokens": ("completions", {"prompt": [5] * 300_000}),
    "tokens of several": ("completions", {"prompt": [[5], [5] * 1000]}),
    "messages": ("chat/completions", {"messages": [{"role": "user", "content": "a" * 2000}] * 400}),
    "parts": ("chat/completions", {"messages": [{"role": "user", "content": [PART]}]}),
    "a pool": ("calm/pool", {"prompt": "a" * 900_000}),
    "a pool of tokens": ("calm/pool", {"prompt": [5] * 1000}),
    "written": ("calm/pool", {"prompt": "a", "written": [5] * 300_000}),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), TOO_LONG.values(), ids=TOO_LONG)
def test_prompts_beyond_the_context_are_refused_before_encoding(path, body, server, monkeypatch):
    if "written" not in body:
        monkeypatch.setattr(endpoint, "encode_documents", must_not_run)
        monkeypatch.setattr(endpoint, "encode_chat", must_not_run)
    response = post(server.url, path, **body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert len(response.content) < 1000


def test_longest_text_that_may_fit_is_encoded(server, tokenizer):
    word = max(tokenizer.get_vocab(), key=len)
    assert "cannot fit" not in post(server.url, prompt="a" * (256 * len(word)), max_tokens=1).text
    assert "cannot fit" in post(server.url, prompt="a" * (256 * len(word) + 1), max_tokens=1).text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a", "max_tokens": 60, "n": 2}, "n"),
        ({"prompt": ["a"] * 2, "max_tokens": 60}, "prompt"),
        ({"prompt": [[5] * 50] * 2, "max_tokens": 1}, "prompt"),
        ({"prompt": [[5] * 30], "max_tokens": 5, "n": 3}, "n"),
    ],
)
def test_tokens_of_a_request_are_limited_in_total(body, field, model, tokenizer):
    with serving(model, tokenizer, max_request_tokens=100) as (engine, _, url):
        response = post(url, **body)
        assert response.status_code == 400 and "at most 100 are allowed" in response.text
        assert response.json()["error"]["param"] == field and engine.statistics.steps == 0
        chat = {"messages": [{"role": "user", "content": "a"}], "n": 4}
        assert "at most 100 are allowed" in post(url, "chat/completions", **chat).text
        assert post(url, prompt=[[5] * 50], max_tokens=50).status_code == 200


def test_models_without_a_context_limit_are_served(model, tokenizer, monkeypatch):
    for name in ("longest_context", "remaining_context"):
        monkeypatch.setattr(endpoint, name, lambda *_: None)
    with serving(model, tokenizer, max_tokens=12) as (_, _, url):
        chat = {"messages": [{"role": "user", "content": "a"}], "seed": 1, "temperature": 1}
        response = post(url, "chat/completions", **chat)
        assert response.json()["usage"]["completion_tokens"] == 12
        assert post(url, "calm/pool", prompt="a", num_draws=8).status_code == 200


@pytest.fixture
def blocked_encoding(monkeypatch):
    """An event that encoding waits for, and the names of the threads that encode."""
    may_encode, threads, encode = threading.Event(), [], endpoint.encode_documents

    def encode_when_allowed(tokenizer, texts):
        threads.append(threading.current_thread().name)
        assert may_encode.wait(20)
        return encode(tokenizer, texts)

    monkeypatch.setattr(endpoint, "encode_documents", encode_when_allowed)
    yield may_encode, threads
    may_encode.set()


def test_encoding_does_not_block_other_requests(model, tokenizer, blocked_encoding):
    may_encode, encoders = blocked_encoding
    with serving(model, tokenizer) as (_, _, url), ThreadPoolExecutor(3) as pool:
        futures = [
            pool.submit(post, url, prompt="One", seed=1, max_tokens=8, temperature=1) for _ in range(2)
        ]
        futures.append(pool.submit(post, url, "calm/pool", prompt="One"))
        wait_until(lambda: encoders)
        assert httpx.get(f"{url}/health", timeout=5).status_code == 200
        assert post(url, prompt=[5, 6, 7], max_tokens=1, model="other").status_code == 404
        may_encode.set()
        expected = generate_text(model, tokenizer, "One", max_new_tokens=8, seed=1, temperature=1.0)
        assert [future.result().json()["choices"][0]["text"] for future in futures[:2]] == [expected] * 2
        assert futures[2].result().status_code == 200
        assert {name.partition("_")[0] for name in encoders} == {"calm-reader"}


def test_abandoned_requests_are_not_encoded(model, tokenizer, blocked_encoding):
    may_encode, encoders = blocked_encoding
    body = json.dumps({"model": "tiny", "prompt": "One", "max_tokens": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with serving(model, tokenizer) as (engine, _, url):
        connections = [connect(url) for _ in range(6)]
        for connection in connections:
            connection.sendall(head + body)
        wait_until(lambda: encoders)
        for connection in connections:
            connection.close()
        gone = 'path="/v1/completions",status="499"} 6.0'
        wait_until(lambda: gone in httpx.get(f"{url}/metrics").text)
        may_encode.set()
        assert post(url, prompt="Two", max_tokens=4).status_code == 200
        assert len(encoders) == 2 and engine.statistics.tokens == 4


def test_time_limit_covers_waiting_for_encoding(model, tokenizer, blocked_encoding):
    may_encode, _ = blocked_encoding
    with serving(model, tokenizer, seconds=0.1) as (engine, _, url):
        response = post(url, prompt="One", max_tokens=1)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        may_encode.set()
        assert engine.statistics.steps == 0


def test_number_of_requests_waiting_for_encoding_is_limited(model, tokenizer, blocked_encoding):
    may_encode, _ = blocked_encoding
    with serving(model, tokenizer, max_waiting=2) as (_, _, url), ThreadPoolExecutor(5) as threads:
        futures = [threads.submit(post, url, prompt="One", max_tokens=1) for _ in range(5)]
        wait_until(lambda: sum(future.done() for future in futures) == 3)
        may_encode.set()
        responses = [future.result() for future in futures]
        assert sorted(response.status_code for response in responses) == [200, 200, 429, 429, 429]
        assert all("retry-after" in response.headers for response in responses if response.status_code == 429)


def test_long_bodies_and_responses_are_handled_off_the_event_loop(server, monkeypatch):
    names, parse, respond = [], bodies.parse_object, app.JSONResponse
    monkeypatch.setattr(app, "_MANY_TOKENS", 4)

    def record_thread(work):
        return lambda content: names.append(threading.current_thread().name) or work(content)

    monkeypatch.setattr(bodies, "parse_object", record_thread(parse))
    monkeypatch.setattr(app, "JSONResponse", record_thread(respond))
    short, long = (
        post(server.url, prompt="a", max_tokens=8, seed=1, user=user) for user in ("", "x" * 500_000)
    )
    assert short.json()["choices"] == long.json()["choices"]
    is_off_the_loop = [name.startswith("calm-reader") for name in names]
    assert is_off_the_loop == [False, True, True, True], "short body, its response, long body, its response"


@pytest.mark.parametrize("stream", [False, True])
def test_long_stops_are_searched_off_the_event_loop(stream, server, model, tokenizer, monkeypatch):
    names, add = set(), TextBuilder.add
    text = generate_text(model, tokenizer, PROMPT, max_new_tokens=60, seed=1, temperature=1.0)
    end = text[30:34]
    arguments = {
        "model": "tiny",
        "prompt": PROMPT,
        "seed": 1,
        "max_tokens": 60,
        "temperature": 1,
        "stream": stream,
    }

    def add_and_record(self, *others):
        names.add(threading.current_thread().name.partition("_")[0])
        return add(self, *others)

    monkeypatch.setattr(TextBuilder, "add", add_and_record)
    stops = [end, *("z" * 999 + str(number) for number in range(3))]
    response = server.client.completions.create(**arguments, stop=stops)
    actual = "".join(event.choices[0].text for event in response) if stream else response.choices[0].text
    assert actual == text[: text.index(end)] and names == {"calm-speller"}


def test_body_bytes_are_limited_per_client_and_in_total():
    intake = Intake(100, 60)

    async def open_request(client, *sizes):
        """Receive a body in messages of these sizes, and keep the request open; how to close it."""
        messages = iter([{"type": "http.request", "body": b"x" * size} for size in sizes])

        async def receive():
            return next(messages)

        request = intake.counted({"client": (client, 1)}, receive)
        counted = request.__enter__()
        for _ in sizes:
            await counted()
        return lambda: request.__exit__(None, None, None)

    async def scenario():
        close_first = await open_request("a", 30, 30)
        with pytest.raises(ApiError, match="from this client"):
            await open_request("a", 1)
        closers = [await open_request("b", 40), await open_request("a", 0)]
        with pytest.raises(ApiError, match="from all clients") as raised:
            await open_request("c", 1)
        assert raised.value.status == 429 and intake.num_bytes == 100
        close_first()
        closers.append(await open_request("c", 60))
        for close in closers:
            close()
        assert intake.num_bytes == 0

    asyncio.run(scenario())


def test_server_refuses_too_many_body_bytes_of_a_client(model, tokenizer, monkeypatch):
    slow_down_steps(monkeypatch, 0.05)
    with serving(model, tokenizer, max_body=1000, max_client_bytes=1500) as (engine, client, url):
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=200, stream=True, user="x" * 700
        )
        wait_until(lambda: engine.num_rows == 1)
        response = post(url, prompt="a", user="x" * 800)
        assert response.status_code == 429 and response.json()["error"]["code"] == "too_many_bytes"
        assert post(url, prompt="a", max_tokens=1).status_code == 200
        stream.close()
        wait_until(lambda: post(url, prompt="a", max_tokens=1, user="x" * 800).status_code == 200)


def test_every_limit_is_an_option_with_the_same_default():
    options = inspect.signature(serve).parameters
    for limit in fields(ServerSettings):
        if limit.name not in ("name", "api_key", "temperature", "draws", "allowed_hosts"):
            assert options[limit.name].default == limit.default, limit.name


def test_default_number_of_draws_is_at_most_max_draws(model):
    request = CompletionRequest(model="tiny", prompt=PROMPT, temperature=0.5)
    for limits, expected in (({}, 200), ({"max_draws": 100}, 100), ({"draws": 30, "max_draws": 100}, 30)):
        sampler = ChunkWriter(model).sampler_for(request, ServerSettings(name="tiny", **limits))
        assert sampler.max_draws == expected
