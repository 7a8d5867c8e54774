"""Connections that are slow, silent, too many, or no HTTP: each gets its time, and an error of the API."""

import json
import resource
import select
import socket
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from serving_client import PROMPT, alone, serving, slowed, wait_until

from calm.serving import connections
from calm.serving.connections import affordable_connections

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
QUICK = {"header_seconds": 0.3, "body_seconds": 0.4, "write_seconds": 0.4}


@pytest.fixture(scope="module")
def quick(model, tokenizer):
    with serving(model, tokenizer, **QUICK) as running:
        yield running


@contextmanager
def connected(url):
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10) as connection:
        yield connection


def rest_of(connection):
    """All that comes until the server hangs up."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def status_of(raw):
    """The status, after a check that the answer is an error of the API."""
    head, _, body = raw.partition(b"\r\n\r\n")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    headers = head.lower()
    assert b"x-request-id: req_" in headers and b"content-type: application/json" in headers
    assert f"content-length: {len(body)}".encode() in headers
    return int(head.split()[1])


def is_well(url):
    assert httpx.get(f"{url}/health", timeout=10).status_code == 200


def trickle(connection, data, pause=0.05):
    """Send byte after byte until the server has had enough, and give what it said."""
    connection.settimeout(pause)
    for place in range(len(data)):
        try:
            connection.sendall(data[place : place + 1])
            if said := connection.recv(1 << 16):
                connection.settimeout(10)
                return said + rest_of(connection)
            return b""
        except socket.timeout:  # noqa: UP041 (another class before Python 3.10)
            continue
    raise AssertionError("the server waited for all of it")


def test_a_silent_connection_is_closed(quick):
    with connected(quick[2]) as connection:
        assert rest_of(connection) == b""
    is_well(quick[2])


@pytest.mark.parametrize(
    "begin", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"], ids=["first", "second"]
)
def test_a_slow_head(begin, quick):
    with connected(quick[2]) as connection:
        connection.sendall(begin)
        if begin:
            assert b"200 OK" in connection.recv(1 << 16)
        assert status_of(trickle(connection, HEAD + b"x: " + b"y" * 1000)) == 408


@pytest.mark.parametrize("framing", [b"content-length: 5000", b"transfer-encoding: chunked"])
def test_a_slow_body(framing, quick):
    body = b"{" if b"length" in framing else b"1\r\n{\r\n"
    with connected(quick[2]) as connection:
        connection.sendall(HEAD + framing + b"\r\n\r\n")
        assert status_of(trickle(connection, body * 1000)) == 408
    _, client, url = quick
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text
    is_well(url)


@pytest.mark.parametrize("path", [b"/nothing", b"/v1/completions"])
def test_a_body_that_nobody_reads_ends_too(path, quick):
    """The answer, an error, comes before the end of the body."""
    head = b"POST " + path + b" HTTP/1.1\r\nhost: evil.example\r\ncontent-length: 100000\r\n\r\n"
    with connected(quick[2]) as connection:
        connection.sendall(head)
        assert b"403" in connection.recv(1 << 16)
        began = time.monotonic()
        with pytest.raises((ConnectionError, AssertionError)):
            assert trickle(connection, b"x" * 1000) == b"more"
        assert time.monotonic() - began < 20


@pytest.fixture
def small_buffers(monkeypatch):
    """Of the system, so that little of an answer is out of this process's hands."""
    made = connections.Connection.connection_made

    def with_small_ones(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(connections.Connection, "connection_made", with_small_ones)


def reads_nothing(url):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    return connection


def test_a_stream_that_is_not_read_ends_its_texts(model, tokenizer, monkeypatch, small_buffers):
    slowed(monkeypatch, 0.02)
    asked = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 200,
        "n": 16,
        "stream": True,
        "return_chunks": True,
    }
    body = json.dumps(asked).encode()
    with serving(model, tokenizer, **QUICK) as (engine, _, url), reads_nothing(url) as connection:
        connection.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.num_rows == 16)
        wait_until(lambda: engine.num_rows == 0)
        assert engine.statistics.tokens < 16 * 200
        is_well(url)


def test_answers_that_are_not_taken(quick, small_buffers):
    """One request after the other."""
    with reads_nothing(quick[2]) as connection:
        # At once: the server has read them all, and nothing it had not read would make the system hang up.
        connection.sendall(50 * b"GET /page/playground.js HTTP/1.1\r\nhost: localhost\r\n\r\n")
        ended = select.poll()
        ended.register(connection, 0)  # Nothing but its end is asked for.
        assert ended.poll(60_000)
        with pytest.raises(ConnectionError):
            rest_of(connection)
    is_well(quick[2])


def test_a_reader_that_is_only_slow_gets_all(quick, small_buffers):
    with reads_nothing(quick[2]) as connection:
        connection.sendall(
            b"GET /page/playground.js HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        )
        said = bytearray()
        while part := connection.recv(500):
            said += part
            time.sleep(0.005)
    assert bytes(said).endswith(httpx.get(f"{quick[2]}/page/playground.js").content)


BAD = {
    "no http": (b"hello\r\n\r\n", 400),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00\x0a" * 20 + b"\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n", 400),
    "version": (b"GET / HTTP/two\r\nhost: localhost\r\n\r\n", 400),
    "two lengths": (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n{", 400),
    "length": (HEAD + b"content-length: -1\r\n\r\n", 400),
    "coding": (HEAD + b"transfer-encoding: gzip\r\n\r\n", 501),
    "chunk": (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    "header": (HEAD + b"a header without colon\r\n\r\n", 400),
    "long header": (HEAD + b"x: " + b"y" * 200_000 + b"\r\n\r\n", 431),
    "many headers": (HEAD + b"".join(b"x%d: y\r\n" % i for i in range(20_000)) + b"\r\n", 431),
    "long target": (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 414),
}


@pytest.mark.parametrize(("raw", "status"), BAD.values(), ids=BAD)
def test_what_is_no_http(raw, status, server):
    with connected(server[2]) as connection:
        connection.sendall(raw)
        said = rest_of(connection)
    assert status_of(said) == status and len(said) < 1000
    is_well(server[2])


def test_too_many_connections_and_those_of_one_client(model, tokenizer):
    for limits, whose in (
        ({"max_connections": 3}, b"3 connections from all clients"),
        ({"max_client_connections": 3}, b"3 connections from one client"),
    ):
        with serving(model, tokenizer, **limits) as (_, _, url), ExitStack() as stack:
            kept = [stack.enter_context(connected(url)) for _ in range(3)]
            for _ in range(5):
                with connected(url) as one:
                    one.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                    said = rest_of(one)
                    assert status_of(said) == 503 and whose in said and b"retry-after" in said.lower()
            kept[0].close()
            wait_until(lambda: can_connect(url))


def can_connect(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_flood_of_connections_leaves_descriptors(model, tokenizer, caplog):
    with serving(model, tokenizer, max_connections=4) as (_, client, url), ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connected(url))
        stack.close()
        wait_until(lambda: can_connect(url))
        text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, seed=1, temperature=1)
        expected = alone(model, tokenizer, PROMPT, max_new_tokens=8, seed=1, temperature=1.0)
        assert text.choices[0].text == expected
    assert "Traceback" not in caplog.text and len(caplog.records) < 20


@pytest.mark.parametrize(("soft", "hard", "expected", "raised"), [
    (10_000, 10_000, (512, 100), []),
    (700, 700, (700 - 262, 100), [700]),
    (600, 700, (700 - 262, 100), [700]),
    (600, 5000, (512, 100), [512 + 262]),
    (262, 262, (100, 50), [262]),
    (82, 82, (10, 5), [82]),
    (10, 10, (1, 1), [10]),
    (resource.RLIM_INFINITY, resource.RLIM_INFINITY, (512, 100), []),
    (300, resource.RLIM_INFINITY, (512, 100), [512 + 262]),
])  # fmt: skip
def test_connections_are_as_many_as_descriptors(soft, hard, expected, raised, monkeypatch):
    limits = []
    monkeypatch.setattr(connections, "_open_files", lambda: 30)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both[0]))
    assert affordable_connections(512) == expected and limits == raised
