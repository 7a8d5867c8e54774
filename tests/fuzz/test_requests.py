"""Requests of all kinds, valid and mutated, complete, streamed and abandoned, against one server.

Every response is that of a valid request or an error of the API, no text is affected by faults of others, and
in the end the engine is alive and idle. A longer run, with new requests each time:
CALM_FUZZ_EXAMPLES=1000 pytest tests/fuzz/test_requests.py.
"""

import copy
import json
import socket

import httpx
import pytest
import torch
from fuzz_budget import BUDGET
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from serving_client import connect, is_api_error, serving, wait_until
from tiny import tiny_model

from calm.data.examples import set_chat_template
from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer

STEPS = 20
SOME_SERVER_ERRORS = (501, 503, 504)  # An unknown transfer encoding, a full or stopping server, a timeout.
COMPLETIONS, CHATS, POOLS = PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/calm/pool")
VALID = [
    (COMPLETIONS, {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 1}),
    (COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 9, "n": 2, "max_draws": 8, "return_chunks": True}),
    (COMPLETIONS, {"prompt": ["a", "b"], "sampler": "pool", "num_draws": 8, "top_p": 0.9, "echo": True}),
    (COMPLETIONS, {"prompt": "One day", "max_tokens": 40, "temperature": 1, "stop": ["e", "z" * 900]}),
    (CHATS, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 1}),
    (CHATS, {"messages": [{"role": "system", "content": "<|eos|>"}, {"role": "user", "content": "a"}],
             "max_completion_tokens": 8, "max_draws": 8}),
    (POOLS, {"prompt": "Once", "num_draws": 150, "temperatures": [1.0, 0.5], "most": 5}),
    (POOLS, {"prompt": [5], "written": [5, 6, 7, 8], "num_draws": 10}),
]  # fmt: skip
FIELDS = (
    "model prompt messages max_tokens max_completion_tokens n stream stream_options stop seed "
    "temperature top_p min_p sampler num_draws max_draws num_thoughts return_chunks echo "
    "written temperatures most user metadata tools logprobs logit_bias response_format role content type "
    "text include_usage nothing"
).split()  # fmt: skip
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 16, 128, 129, 319, 320, 2**31, 2**63, -(2**63), 10**30, 0.5, 1.0, 1e-300, 1e308]
)
TEXTS = st.sampled_from(
    ["", "a", "tiny", "exact", "head", "user", "\x00", "\U0001f600", "<|eos|>", "\ue0f01\ue0f1", "z" * 5000]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.integers()
    | st.floats(allow_nan=False)
    | TEXTS
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8,
)


def paths_in(value, parents=()):
    """Paths of keys and indices to everything in a body."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*parents, key)
        yield from paths_in(inner, (*parents, key))


@st.composite
def mutated_bodies(draw):
    """A valid request with a few values changed, removed or added; sometimes its bytes are changed too."""
    path, body = draw(st.sampled_from(VALID))
    body = copy.deepcopy({"model": "tiny", "seed": 1, **body})
    for _ in range(draw(st.integers(1, 4))):
        paths = list(paths_in(body))
        *parents, last = (
            draw(st.sampled_from(paths))
            if paths and draw(st.booleans())
            else (draw(st.sampled_from(FIELDS)),)
        )
        inner = body
        for key in parents:
            inner = inner[key]
        if draw(st.integers(0, 4)) == 0 and isinstance(inner, dict):
            inner.pop(last, None)
        else:
            inner[last] = draw(VALUES)
    raw = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        start = draw(st.integers(0, len(raw)))
        raw = raw[:start] + draw(st.binary(max_size=4)) + raw[start + draw(st.integers(0, 4)) :]
    return draw(st.sampled_from(PATHS)) if draw(st.integers(0, 9)) == 0 else path, raw


class Requests(RuleBasedStateMachine):
    """Actions of clients, in any order."""

    url, engine, expected = "", None, ()

    def __init__(self):
        super().__init__()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self.streams, self.sockets = [], []

    @rule(number=st.integers(0, len(VALID) - 1))
    def send_valid(self, number):
        assert result_of(self.post(*valid_request(number))) == self.expected[number]

    @rule(number=st.integers(0, len(VALID) - 3))
    def send_valid_for_a_stream(self, number):
        path, raw = valid_request(number, stream=True)
        response = self.post(path, raw)
        assert response.text.endswith("data: [DONE]\n\n")
        texts = {}
        for event in response.text.split("\n\n")[:-2]:
            for choice in json.loads(event.removeprefix("data: "))["choices"]:
                new = choice["text"] if path == COMPLETIONS else choice["delta"].get("content", "")
                texts[choice["index"]] = texts.get(choice["index"], "") + new
        assert [texts[index] for index in sorted(texts)] == self.expected[number]

    @rule(body=mutated_bodies(), headers=st.sampled_from([
        {}, {"content-type": "text/plain"}, {"content-encoding": "gzip"}, {"host": "evil.example"},
        {"authorization": "Bearer \xff"}, {"origin": "http://evil.example"},
        {"content-type": "multipart/form-data"},
    ]))  # fmt: skip
    def send_mutated(self, body, headers):
        headers = {name: value.encode("latin-1") for name, value in headers.items()}
        self.check_response(self.post(*body, headers))

    @rule(method=st.sampled_from(["GET", "PUT", "OPTIONS", "HEAD", "odd"]), path=st.sampled_from([
        *PATHS, "/", "/health", "/metrics", "/v1/models", "/v1/models/tiny", "/v1/models/%00", "/page/x",
        "//", "/%ff",
    ]))  # fmt: skip
    def visit_path(self, method, path):
        response = self.client.request(method, path)
        assert response.status_code < 500
        if method not in ("HEAD", "OPTIONS"):
            self.check_response(response)

    @rule(raw=st.binary(max_size=60), beginning=st.sampled_from([
        b"", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: ",
        b"POST /v1/calm/pool HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n",
    ]))  # fmt: skip
    def send_raw_bytes(self, raw, beginning):
        with connect(self.url, timeout=60) as connection:
            connection.sendall(beginning + raw + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            parts = []
            while part := connection.recv(1 << 16):
                parts.append(part)
        if parts and b" 200 " not in parts[0][:20]:
            head, _, body = b"".join(parts).partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            self.check_response(httpx.Response(int(head.split()[1]), content=body[:length]))

    @rule(
        body=mutated_bodies() | st.integers(0, len(VALID) - 1).map(lambda number: valid_request(number)),
        part=st.floats(0, 1),
    )
    def send_without_reading(self, body, part):
        """A part of the body or all of it; nobody reads the response."""
        path, raw = body
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n\r\n".encode()
        connection = connect(self.url, timeout=60)
        connection.sendall(head + raw[: int(len(raw) * part)] if part < 0.5 else head + raw)
        self.sockets.append(connection)

    @precondition(lambda self: len(self.streams) < 4)
    @rule(number=st.integers(0, 5))
    def open_stream(self, number):
        path, raw = valid_request(number, stream=True, max_tokens=100, max_completion_tokens=None)
        stream = self.client.stream("POST", path, content=raw)
        stream.__enter__()
        self.streams.append(stream)

    @precondition(lambda self: self.streams)
    @rule()
    def abandon_stream(self):
        self.streams.pop(0).__exit__(None, None, None)

    @precondition(lambda self: self.sockets)
    @rule()
    def hang_up(self):
        self.sockets.pop(0).close()

    def post(self, path, raw, headers=None):
        return self.client.post(path, content=raw, headers=headers)

    def check_response(self, response):
        assert response.status_code < 500 or response.status_code in SOME_SERVER_ERRORS, response.text
        if response.status_code >= 400:
            assert is_api_error(response)
            assert len(response.content) < 2000
        elif response.headers.get("content-type", "").startswith("text/event-stream"):
            events = [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-2]]
            assert not any(event.get("error", {}).get("type") == "server_error" for event in events)

    def teardown(self):
        for stream in self.streams:
            stream.__exit__(None, None, None)
        for connection in self.sockets:
            connection.close()
        self.client.close()
        wait_until(
            lambda: self.engine.num_rows + self.engine.num_waiting + self.engine.num_tasks == 0, seconds=30
        )
        assert self.engine.is_alive


def valid_request(number, **changes):
    path, body = VALID[number]
    return path, json.dumps({"model": "tiny", "seed": number, **body, **changes}).encode()


def result_of(response):
    """The texts of a response, or the candidates of its pool."""
    assert response.status_code == 200, response.text
    body = response.json()
    if body["object"] == "calm.pool":
        return body["candidates"]
    return [
        choice["text"] if "text" in choice else choice["message"]["content"] for choice in body["choices"]
    ]


@pytest.fixture(scope="module")
def server():
    tokenizer = train_tokenizer(stories(0, 20), 320)
    set_chat_template(tokenizer, None)
    torch.manual_seed(4)
    with serving(
        tiny_model(4, vocab_size=320), tokenizer, max_body=50_000, max_draws=200, max_tokens=100
    ) as running:
        yield running


def test_server_survives_requests_in_any_order(server):
    engine, _, url = server
    with httpx.Client(base_url=url, timeout=60) as client:
        expected = [
            result_of(client.post(path, content=raw)) for path, raw in map(valid_request, range(len(VALID)))
        ]
    Machine = type("Machine", (Requests,), {"url": url, "engine": engine, "expected": expected})
    run_state_machine_as_test(Machine, settings=settings(BUDGET, stateful_step_count=STEPS))
    assert engine.is_alive
