"""Every count, length and product of a request has a ceiling, and none of its work holds the others up."""

import asyncio
import inspect
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import httpx
import pytest
from serving_client import PROMPT, alone, serving, slowed, wait_until

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


def must_not_run(*_):
    raise AssertionError("this must be refused before any work")


PART = {"type": "text", "text": "a" * 900_000}
LONG = {
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


@pytest.mark.parametrize(("path", "body"), LONG.values(), ids=LONG)
def test_what_fits_in_no_context_is_not_even_read(path, body, server, monkeypatch):
    if "written" not in body:
        monkeypatch.setattr(endpoint, "encode_documents", must_not_run)
        monkeypatch.setattr(endpoint, "encode_chat", must_not_run)
    answer = post(server[2], path, **body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert len(answer.content) < 1000


def test_the_longest_text_that_can_fit_is_read(server, tokenizer):
    word = max(tokenizer.get_vocab(), key=len)
    assert "cannot fit" not in post(server[2], prompt="a" * (256 * len(word)), max_tokens=1).text
    assert "cannot fit" in post(server[2], prompt="a" * (256 * len(word) + 1), max_tokens=1).text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a", "max_tokens": 60, "n": 2}, "n"),
        ({"prompt": ["a"] * 2, "max_tokens": 60}, "prompt"),
        ({"prompt": [[5] * 50] * 2, "max_tokens": 1}, "prompt"),
        ({"prompt": [[5] * 30], "max_tokens": 5, "n": 3}, "n"),
    ],
)
def test_tokens_of_all_texts_together(body, field, model, tokenizer):
    with serving(model, tokenizer, max_request_tokens=100) as (engine, _, url):
        answer = post(url, **body)
        assert answer.status_code == 400 and "at most 100 are allowed" in answer.text
        assert answer.json()["error"]["param"] == field and engine.statistics.steps == 0
        chat = {"messages": [{"role": "user", "content": "a"}], "n": 4}
        assert "at most 100 are allowed" in post(url, "chat/completions", **chat).text
        assert post(url, prompt=[[5] * 50], max_tokens=50).status_code == 200


def test_a_context_without_a_limit_leaves_room(model, tokenizer, monkeypatch):
    for name in ("longest_context", "remaining_context"):
        monkeypatch.setattr(endpoint, name, lambda *_: None)
    with serving(model, tokenizer, max_tokens=12) as (_, _, url):
        chat = {"messages": [{"role": "user", "content": "a"}], "seed": 1, "temperature": 1}
        answer = post(url, "chat/completions", **chat)
        assert answer.json()["usage"]["completion_tokens"] == 12
        assert post(url, "calm/pool", prompt="a", num_draws=8).status_code == 200


@pytest.fixture
def held(monkeypatch):
    """Texts are read as soon as this is set; what was read."""
    may_go_on, read, real = threading.Event(), [], endpoint.encode_documents

    def wait(tokenizer, texts):
        read.append(threading.current_thread().name)
        assert may_go_on.wait(20)
        return real(tokenizer, texts)

    monkeypatch.setattr(endpoint, "encode_documents", wait)
    yield may_go_on, read
    may_go_on.set()


def test_reading_holds_nobody_up(model, tokenizer, held):
    may_go_on, _ = held
    with serving(model, tokenizer) as (_, _, url), ThreadPoolExecutor(3) as threads:
        asked = [
            threads.submit(post, url, prompt="One", seed=1, max_tokens=8, temperature=1) for _ in range(2)
        ]
        asked.append(threads.submit(post, url, "calm/pool", prompt="One"))
        wait_until(lambda: held[1])
        assert httpx.get(f"{url}/health", timeout=5).status_code == 200
        assert post(url, prompt=[5, 6, 7], max_tokens=1, model="other").status_code == 404
        may_go_on.set()
        expected = alone(model, tokenizer, "One", max_new_tokens=8, seed=1, temperature=1.0)
        assert [one.result().json()["choices"][0]["text"] for one in asked[:2]] == [expected] * 2
        assert asked[2].result().status_code == 200
        assert {name.partition("_")[0] for name in held[1]} == {"calm-reader"}


def test_a_text_that_nobody_waits_for_is_not_read(model, tokenizer, held):
    may_go_on, read = held
    body = json.dumps({"model": "tiny", "prompt": "One", "max_tokens": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with serving(model, tokenizer) as (engine, _, url):
        connections = [socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) for _ in range(6)]
        for connection in connections:
            connection.sendall(head + body)
        wait_until(lambda: read)
        for connection in connections:
            connection.close()
        gone = 'path="/v1/completions",status="499"} 6.0'
        wait_until(lambda: gone in httpx.get(f"{url}/metrics").text)
        may_go_on.set()
        assert post(url, prompt="Two", max_tokens=4).status_code == 200
        assert len(read) == 2 and engine.statistics.tokens == 4


def test_what_waits_too_long_to_be_read(model, tokenizer, held):
    with serving(model, tokenizer, seconds=0.1) as (engine, _, url):
        answer = post(url, prompt="One", max_tokens=1)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        held[0].set()
        assert engine.statistics.steps == 0


def test_too_many_wait_to_be_read(model, tokenizer, held):
    with serving(model, tokenizer, max_waiting=2) as (_, _, url), ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(post, url, prompt="One", max_tokens=1) for _ in range(5)]
        wait_until(lambda: sum(one.done() for one in asked) == 3)
        held[0].set()
        answers = [one.result() for one in asked]
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_long_bodies_and_answers_are_worked_on_off_the_event_loop(server, monkeypatch):
    names, real = [], bodies.parse_object
    monkeypatch.setattr(app, "_MANY_TOKENS", 4)
    monkeypatch.setattr(
        bodies, "parse_object", lambda raw: names.append(threading.current_thread().name) or real(raw)
    )
    short, long = (
        post(server[2], prompt="a", max_tokens=8, seed=1, user=user) for user in ("", "x" * 500_000)
    )
    assert short.json()["choices"] == long.json()["choices"]
    assert not names[0].startswith("calm-reader") and names[1].startswith("calm-reader")


@pytest.mark.parametrize("stream", [False, True])
def test_long_stops_are_looked_for_off_the_event_loop(stream, server, model, tokenizer, monkeypatch):
    names, add = set(), TextBuilder.add
    text = alone(model, tokenizer, PROMPT, max_new_tokens=60, seed=1, temperature=1.0)
    end = text[30:34]
    asked = {
        "model": "tiny",
        "prompt": PROMPT,
        "seed": 1,
        "max_tokens": 60,
        "temperature": 1,
        "stream": stream,
    }

    def note(self, *arguments):
        names.add(threading.current_thread().name.partition("_")[0])
        return add(self, *arguments)

    monkeypatch.setattr(TextBuilder, "add", note)
    stops = [end, *("z" * 999 + str(number) for number in range(3))]
    answer = server[1].completions.create(**asked, stop=stops)
    got = "".join(one.choices[0].text for one in answer) if stream else answer.choices[0].text
    assert got == text[: text.index(end)] and names == {"calm-speller"}


def test_bytes_of_a_client_and_of_all():
    intake = Intake(100, 60)

    async def take(client, *sizes):
        """Messages of a body, in a request that stays open; its end."""
        messages = iter([{"type": "http.request", "body": b"x" * size} for size in sizes])

        async def receive():
            return next(messages)

        held = intake.counted({"client": (client, 1)}, receive)
        counted = held.__enter__()
        for _ in sizes:
            await counted()
        return lambda: held.__exit__(None, None, None)

    async def story():
        end = await take("a", 30, 30)
        with pytest.raises(ApiError, match="from this client"):
            await take("a", 1)
        ends = [await take("b", 40), await take("a", 0)]
        with pytest.raises(ApiError, match="from all clients") as raised:
            await take("c", 1)
        assert raised.value.status == 429 and intake.num_bytes == 100
        end()
        ends.append(await take("c", 60))
        for one in ends:
            one()
        assert intake.num_bytes == 0

    asyncio.run(story())


def test_bytes_in_flight(model, tokenizer, monkeypatch):
    slowed(monkeypatch, 0.05)
    with serving(model, tokenizer, max_body=1000, max_client_bytes=1500) as (engine, client, url):
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=200, stream=True, user="x" * 700
        )
        wait_until(lambda: engine.num_rows == 1)
        answer = post(url, prompt="a", user="x" * 800)
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "too_many_bytes"
        assert post(url, prompt="a", max_tokens=1).status_code == 200
        stream.close()
        wait_until(lambda: post(url, prompt="a", max_tokens=1, user="x" * 800).status_code == 200)


def test_every_limit_is_an_option_with_the_same_default():
    options = inspect.signature(serve).parameters
    for limit in fields(ServerSettings):
        if limit.name not in ("name", "api_key", "temperature", "draws", "allowed_hosts"):
            assert options[limit.name].default == limit.default, limit.name


def test_a_request_without_a_number_of_draws_gets_at_most_the_maximum(model):
    request = CompletionRequest(model="tiny", prompt=PROMPT, temperature=0.5)
    for limits, expected in (({}, 200), ({"max_draws": 100}, 100), ({"draws": 30, "max_draws": 100}, 30)):
        sampler = ChunkWriter(model).sampler_for(request, ServerSettings(name="tiny", **limits))
        assert sampler.max_draws == expected
