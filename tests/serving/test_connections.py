"""Connections that are slow, silent, too many, or not HTTP: time limits, and errors in the API's format."""

import json
import resource
import select
import socket
import time
from contextlib import ExitStack, suppress

import httpx
import pytest
from serving_client import PROMPT, address_of, connect, generate_text, serving, slow_down_steps, wait_until

from calm.serving import connections
from calm.serving.connections import affordable_connections

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
SHORT_TIMEOUTS = {"header_seconds": 0.3, "body_seconds": 0.4, "write_seconds": 0.4}


@pytest.fixture(scope="module")
def impatient_server(model, tokenizer):
    with serving(model, tokenizer, **SHORT_TIMEOUTS) as running:
        yield running


def read_to_end(connection):
    """Everything that arrives until the server hangs up."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def status_of_error(raw):
    """The status of a raw response, which must be an error of the API."""
    head, _, body = raw.partition(b"\r\n\r\n")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    headers = head.lower()
    assert b"x-request-id: req_" in headers and b"content-type: application/json" in headers
    assert f"content-length: {len(body)}".encode() in headers
    return int(head.split()[1])


def check_health(url):
    assert httpx.get(f"{url}/health", timeout=10).status_code == 200


def trickle(connection, data, pause=0.05):
    """Send byte by byte until the server responds or hangs up; return the response."""
    connection.settimeout(pause)
    for index in range(len(data)):
        try:
            connection.sendall(data[index : index + 1])
            if response := connection.recv(1 << 16):
                connection.settimeout(10)
                return response + read_to_end(connection)
            return b""
        except socket.timeout:  # noqa: UP041 (another class before Python 3.10)
            continue
    raise AssertionError("the server waited for all of it")


def test_a_silent_connection_is_closed(impatient_server):
    with connect(impatient_server.url) as connection:
        assert read_to_end(connection) == b""
    check_health(impatient_server.url)


@pytest.mark.parametrize(
    "previous_request", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"], ids=["first", "second"]
)
def test_slow_request_head_times_out(previous_request, impatient_server):
    with connect(impatient_server.url) as connection:
        connection.sendall(previous_request)
        if previous_request:
            assert b"200 OK" in connection.recv(1 << 16)
        assert status_of_error(trickle(connection, HEAD + b"x: " + b"y" * 1000)) == 408


@pytest.mark.parametrize("framing", [b"content-length: 5000", b"transfer-encoding: chunked"])
def test_slow_request_body_times_out(framing, impatient_server):
    body = b"{" if b"length" in framing else b"1\r\n{\r\n"
    with connect(impatient_server.url) as connection:
        connection.sendall(HEAD + framing + b"\r\n\r\n")
        assert status_of_error(trickle(connection, body * 1000)) == 408
    _, client, url = impatient_server
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text
    check_health(url)


@pytest.mark.parametrize("path", [b"/nothing", b"/v1/completions"])
def test_unread_request_body_is_cut_off(path, impatient_server):
    """The server responds with an error before the body ends."""
    head = b"POST " + path + b" HTTP/1.1\r\nhost: evil.example\r\ncontent-length: 100000\r\n\r\n"
    with connect(impatient_server.url) as connection:
        connection.sendall(head)
        assert b"403" in connection.recv(1 << 16)
        began = time.monotonic()
        with suppress(ConnectionError):
            trickle(connection, b"x" * 1000)
        assert time.monotonic() - began < 20


@pytest.fixture
def small_buffers(monkeypatch):
    """A small send buffer in the system, so that most of an unread response stays in the server."""
    connection_made = connections.Connection.connection_made

    def with_small_buffer(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection_made(self, transport)

    monkeypatch.setattr(connections.Connection, "connection_made", with_small_buffer)


def connect_with_small_buffer(url):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect(address_of(url))
    return connection


def test_unread_stream_cancels_its_texts(model, tokenizer, monkeypatch, small_buffers):
    slow_down_steps(monkeypatch, 0.02)
    request = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 200,
        "n": 16,
        "stream": True,
        "return_chunks": True,
    }
    body = json.dumps(request).encode()
    with (
        serving(model, tokenizer, **SHORT_TIMEOUTS) as (engine, _, url),
        connect_with_small_buffer(url) as connection,
    ):
        connection.sendall(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: engine.num_rows == 16)
        wait_until(lambda: engine.num_rows == 0)
        assert engine.statistics.tokens < 16 * 200
        check_health(url)


def test_connection_with_unread_responses_is_closed(impatient_server, small_buffers):
    """The requests are pipelined."""
    with connect_with_small_buffer(impatient_server.url) as connection:
        # All at once: the server reads every request, so unread input cannot be why the connection ends.
        connection.sendall(50 * b"GET /page/playground.js HTTP/1.1\r\nhost: localhost\r\n\r\n")
        poller = select.poll()
        poller.register(connection, 0)  # Wait only for its end.
        assert poller.poll(60_000)
        with pytest.raises(ConnectionError):
            read_to_end(connection)
    check_health(impatient_server.url)


def test_slow_reader_receives_the_whole_response(impatient_server, small_buffers):
    with connect_with_small_buffer(impatient_server.url) as connection:
        connection.sendall(
            b"GET /page/playground.js HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        )
        received = bytearray()
        while part := connection.recv(500):
            received += part
            time.sleep(0.005)
    assert bytes(received).endswith(httpx.get(f"{impatient_server.url}/page/playground.js").content)


MALFORMED = {
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


@pytest.mark.parametrize(("raw", "status"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_get_api_errors(raw, status, server):
    with connect(server.url) as connection:
        connection.sendall(raw)
        response = read_to_end(connection)
    assert status_of_error(response) == status and len(response) < 1000
    check_health(server.url)


def test_connections_are_limited_in_total_and_per_client(model, tokenizer):
    for limits, message in (
        ({"max_connections": 3}, b"3 connections from all clients"),
        ({"max_client_connections": 3}, b"3 connections from one client"),
    ):
        with serving(model, tokenizer, **limits) as (_, _, url), ExitStack() as stack:
            held = [stack.enter_context(connect(url)) for _ in range(3)]
            for _ in range(5):
                with connect(url) as refused:
                    refused.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                    response = read_to_end(refused)
                    assert status_of_error(response) == 503
                    assert message in response and b"retry-after" in response.lower()
            held[0].close()
            wait_until(lambda: can_connect(url))


def can_connect(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_server_recovers_from_a_flood_of_connections(model, tokenizer, caplog):
    with serving(model, tokenizer, max_connections=4) as (_, client, url), ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(url))
        stack.close()
        wait_until(lambda: can_connect(url))
        completion = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=8, seed=1, temperature=1
        )
        expected = generate_text(model, tokenizer, PROMPT, max_new_tokens=8, seed=1, temperature=1.0)
        assert completion.choices[0].text == expected
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
def test_connection_limits_follow_file_descriptor_limits(soft, hard, expected, raised, monkeypatch):
    limits = []
    monkeypatch.setattr(connections, "_open_files", lambda: 30)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, soft_and_hard: limits.append(soft_and_hard[0]))
    assert affordable_connections(512) == expected and limits == raised
