"""Statuses and headers as the standards have them: keys, methods, ids of requests, when to try again."""

import json
import socket

import httpx
import openai
import pytest
from serving_client import PROMPT, serving, slowed, wait_until

from calm.models.generation.batching import ChunkBatch
from calm.serving import endpoint, formats

HTTP = httpx.Client(timeout=30)  # Quicker than one for each request.


def is_of_the_api(answer):
    return set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_key(model, tokenizer):
    with serving(model, tokenizer, api_key="s3cret") as (_, client, url):
        with pytest.raises(openai.AuthenticationError) as raised:
            client.models.list()
        assert raised.value.code == "invalid_api_key"
        refused = HTTP.get(f"{url}/metrics")
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert is_of_the_api(refused) and refused.headers["x-request-id"]
        assert HTTP.get(f"{url}/health").status_code == 200
        assert [m.id for m in client.with_options(api_key="s3cret").models.list()] == ["tiny"]

        def status(shown):
            return HTTP.get(f"{url}/v1/models", headers={"authorization": shown}).status_code

        for wrong in ("s3cre", "s3cret1", "S3CRET", "ä", "\u00ff\u00fe"):
            assert status(f"Bearer {wrong}".encode("latin-1")) == 401
        for scheme in ("Basic s3cret", "s3cret", "Bearer", "Bearers3cret"):
            assert status(scheme) == 401
        for scheme in ("Bearer", "bearer", "BEARER", "Bearer  "):
            assert status(f"{scheme} s3cret") == 200


@pytest.mark.parametrize("key", ["schlüssel", "voilà", "\u2105", "\udcff\udca0", " spaces around "])
def test_a_key_of_other_bytes(key, model, tokenizer):
    """As the environment may hold them."""
    with serving(model, tokenizer, api_key=key) as (_, _, url):
        shown = b"Bearer " + key.encode("utf-8", "surrogateescape").strip()
        assert HTTP.get(f"{url}/v1/models", headers={"authorization": shown}).status_code == 200
        assert HTTP.get(f"{url}/v1/models", headers={"authorization": shown + b"x"}).status_code == 401
        assert HTTP.get(f"{url}/v1/models", headers={"authorization": shown[:-1]}).status_code == 401


def test_a_key_in_the_latin_1_of_some_clients(model, tokenizer):
    with serving(model, tokenizer, api_key="schl\u00fcssel") as (_, _, url):
        for encoding in ("utf-8", "latin-1"):
            shown = {"authorization": "Bearer schl\u00fcssel".encode(encoding)}
            assert HTTP.get(f"{url}/v1/models", headers=shown).status_code == 200
        for wrong in (b"Bearer schl\xfdssel", b"Bearer schlussel", b"Bearer schl\xff\xfcssel"):
            assert HTTP.get(f"{url}/v1/models", headers={"authorization": wrong}).status_code == 401


def test_unknown_paths_and_methods(server):
    _, _, url = server
    for answer in (HTTP.get(f"{url}/v1/nothing"), HTTP.post(f"{url}/v1/embeddings"), HTTP.get(f"{url}//")):
        assert answer.status_code == 404 and is_of_the_api(answer)
    answer = HTTP.get(f"{url}/v1/completions")
    assert answer.status_code == 405 and is_of_the_api(answer)
    assert answer.headers["allow"] == "OPTIONS, POST"
    assert HTTP.delete(f"{url}/v1/models").headers["allow"] == "GET, HEAD, OPTIONS"


def test_a_slash_at_the_end_is_no_matter(server, model, tokenizer):
    _, _, url = server
    for path in ("/v1/models", "/v1/models/tiny", "/health", "/page"):
        answer = HTTP.get(f"{url}{path}/")
        assert answer.status_code == 200 and answer.json() == HTTP.get(url + path).json()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
    assert HTTP.post(f"{url}/v1/completions/", json=body).status_code == 200
    with serving(model, tokenizer, api_key="k") as (_, _, url):
        assert HTTP.get(f"{url}/metrics/").status_code == 401


def test_head_is_get_without_a_body_and_options_lists_methods(server):
    _, _, url = server
    for path in ("/", "/health", "/v1/models", "/v1/models/tiny"):
        head, get = HTTP.head(url + path), HTTP.get(url + path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == str(len(get.content))
    assert HTTP.head(f"{url}/v1/models/other").status_code == 404
    assert HTTP.head(f"{url}/v1/completions").status_code == 405
    answer = HTTP.options(f"{url}/v1/completions")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, "OPTIONS, POST", b"")


def test_odd_hosts_and_paths_are_no_fault_of_the_server(server):
    _, _, url = server
    for host in (b"[", b"\xff", b"a b"):
        for path in ("/nothing", "/v1/completions", "/v1/models/%ed%a0%80", "/%00%0d%0a"):
            answer = HTTP.get(url + path, headers={"host": host})
            assert answer.status_code == 403 and is_of_the_api(answer)
    for path in ("/v1/models/%ed%a0%80", "/%00%0d%0a"):
        assert HTTP.get(url + path).status_code == 404


def test_every_answer_has_an_id(server):
    _, client, url = server
    answers = [HTTP.get(url + path) for path in ("/v1/models", "/v1/models", "/nothing", "/v1/completions")]
    answers.append(HTTP.post(f"{url}/v1/completions", content=b"{"))
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4)._request_id.startswith("req_")


def test_when_to_try_again(model, tokenizer, monkeypatch):
    slowed(monkeypatch, 0.05)
    with serving(model, tokenizer, max_rows=1, max_waiting=1) as (engine, client, url):
        arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200}
        streams = [client.completions.create(**arguments, stream=True)]
        wait_until(lambda: engine.num_rows == 1)
        streams.append(client.completions.create(**arguments, stream=True))
        full = HTTP.post(f"{url}/v1/completions", json=arguments)
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        never = HTTP.post(f"{url}/v1/completions", json={**arguments, "n": 2})
        assert never.status_code == 400 and "retry-after" not in never.headers
        for stream in streams:
            stream.close()
        engine.stop()
        pool = {"model": "tiny", "prompt": PROMPT}
        for path, body in (("/v1/completions", arguments), ("/v1/calm/pool", pool)):
            late = HTTP.post(url + path, json=body)
            assert (late.status_code, late.headers["retry-after"]) == (503, "1") and is_of_the_api(late)
        assert HTTP.get(f"{url}/health").headers["retry-after"] == "1"


def test_a_mistake_of_the_server_is_told_by_the_id_in_its_log(server, monkeypatch, caplog):
    _, _, url = server
    monkeypatch.setattr(endpoint, "encode_documents", lambda *_: 1 / 0)
    answer = HTTP.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert answer.status_code == 500 and is_of_the_api(answer)
    name = answer.headers["x-request-id"]
    assert name in answer.json()["error"]["message"] and name in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_mistake_within_a_stream_is_told_alike(server, monkeypatch, caplog):
    _, _, url = server
    monkeypatch.setattr(formats.CompletionFormat, "_delta", lambda *_: 1 / 0)
    body = {"model": "tiny", "prompt": "a", "stream": True}
    answer = HTTP.post(f"{url}/v1/completions", json=body)
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    event, end, _ = answer.text.split("\n\n")
    name = answer.headers["x-request-id"]
    assert name in json.loads(event.removeprefix("data: "))["error"]["message"] and end == "data: [DONE]"
    assert name in caplog.text and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("chat", [False, True])
def test_an_error_inside_a_stream_is_an_event_and_then_the_end(chat, model, tokenizer, monkeypatch):
    def broken(self):
        raise ValueError("the head drew a latent that is not finite")

    monkeypatch.setattr(ChunkBatch, "step", broken)
    with serving(model, tokenizer) as (_, client, url):
        path = "/v1/chat/completions" if chat else "/v1/completions"
        asked = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
        body = {"model": "tiny", "stream": True, **asked}
        events = HTTP.post(url + path, json=body).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        error = json.loads(events[-3].removeprefix("data: "))["error"]
        assert set(error) == {"message", "type", "param", "code"}
        endpoint = client.chat.completions if chat else client.completions
        with pytest.raises(openai.APIError, match="not finite"):
            list(endpoint.create(model="tiny", stream=True, **asked))


def test_a_client_that_leaves_before_the_end_of_its_body_is_no_mistake(server, caplog):
    _, client, url = server
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-length: 100\r\n\r\n{")
    label = 'path="/v1/completions",status="499"'
    wait_until(lambda: label in HTTP.get(f"{url}/metrics").text)
    assert "failed" not in caplog.text and client.models.list()
