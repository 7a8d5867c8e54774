"""Host names that a server answers to: other names, which DNS rebinding would use, get nothing."""

import socket

import httpx
import pytest
from serving_client import PROMPT, serving
from toy import failure

from calm.serving.errors import ApiError
from calm.serving.hosts import Hosts

SAFE = [
    None, "localhost", "LocalHost:8000", "localhost.", "localhost:", "127.0.0.1:8000", "127.8.9.1",
    "10.0.0.7:1", "0.0.0.0", "8.8.8.8:80", "[::1]:8000", "[::1]", "[2001:db8::7]:8000", "[::ffff:127.0.0.1]",
    " localhost ",
    socket.gethostname(), f"{socket.gethostname().upper()}:8000",
]  # fmt: skip
UNSAFE = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "evil.localhost", "127.0.0.1.evil.example",
    "127.0.0.1.nip.io:8000", "localhost@evil.example", "evil.example#localhost", "localhost/evil",
    "", ":8000",
    "[evil.example]", "[127.0.0.1]", "::1", "::1:8000", "[::1", "[::1]x", "[::1]:80:80", "localhost:80x",
    "localhost:80:80", "local host", "localhost,evil.example", "localhost\x00",
    "127.1", "0x7f000001", "2130706433",
    "127.0.0.1:\u0661", "\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3", "\xff",
    "[", "*", "a" * 70_000,
]  # fmt: skip


@pytest.mark.parametrize("host", SAFE, ids=repr)
def test_local_names_and_ip_addresses_are_accepted(host):
    Hosts().check(host)


@pytest.mark.parametrize("host", UNSAFE, ids=lambda host: repr(host)[:30])
def test_other_names_are_refused(host):
    with pytest.raises(ApiError, match="does not accept the host name") as raised:
        Hosts().check(host)
    assert raised.value.status == 403 and len(str(raised.value)) < 500
    Hosts(["*"]).check(host)


def test_allowed_hosts_match_exactly_or_by_wildcard():
    hosts = Hosts(["Example.org", "*.lan", "caf\u00e9.example".encode("idna").decode(), "api.example.org."])
    for name in ("example.org", "EXAMPLE.ORG:443", "example.org.", "a.lan", "b.a.lan:1", "api.example.org"):
        hosts.check(name)
    for name in ("www.example.org", "example.org.evil", "lan", ".lan.evil", "anlan", "xexample.org"):
        with pytest.raises(ApiError):
            hosts.check(name)


@pytest.mark.parametrize(
    "name", ["http://a.org", "a.org:80", "a.org/x", "", "a b", "*.*", "**", "a*", "caf\u00e9"]
)
def test_invalid_allowed_hosts_are_refused(name, capsys):
    with pytest.raises(ValueError, match="is not a host name"):
        Hosts([name])
    assert "is not a host name" in failure(capsys, "serve", "stories", f"--allowed_hosts={[name]}")
    if name == "http://a.org":  # One name needs no brackets.
        assert "is not a host name" in failure(capsys, "serve", "stories", "--allowed_hosts", name)


PATHS = (
    "/",
    "/page",
    "/page/playground.js",
    "/health",
    "/metrics",
    "/v1/models",
    "/v1/models/tiny",
    "/nothing",
)


@pytest.mark.parametrize("settings", [{}, {"api_key": "any"}], ids=["open", "with a key"])
def test_every_path_refuses_other_host_names(settings, model, tokenizer):
    with serving(model, tokenizer, **settings) as (engine, _, url):
        headers = {"host": "evil.example", "authorization": "Bearer any"}
        body = {"model": "tiny", "prompt": PROMPT, "messages": []}
        responses = [httpx.get(url + path, headers=headers) for path in (*PATHS, "/v1/completions")]
        responses += [httpx.head(f"{url}/metrics", headers=headers), httpx.options(url, headers=headers)]
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/calm/pool"):
            responses.append(httpx.post(url + path, json=body, headers=headers))
        assert {response.status_code for response in responses} == {403}
        assert responses[0].json()["error"]["code"] == "host_not_allowed"
        assert responses[0].headers["x-request-id"]
        assert engine.statistics.steps == 0
        for path in PATHS[:-1]:
            assert httpx.get(url + path, headers={**headers, "host": "localhost:1"}).status_code == 200
    with serving(model, tokenizer, allowed_hosts=["evil.example"], **settings) as (_, _, url):
        assert httpx.get(f"{url}/metrics", headers=headers).status_code == 200
