"""Statuses and headers follow the standards: keys, methods, request ids, Retry-After."""

import json

import httpx
import openai
import pytest
from serving_client import PROMPT, connect, is_api_error, serving, slow_down_steps, wait_until

from calm.models.generation.batching import ChunkBatch
from calm.serving import endpoint, formats

HTTP = httpx.Client(timeout=30)  # Faster than a new client for each request.


def test_key_is_required_and_must_match_exactly(model, tokenizer):
    with serving(model, tokenizer, api_key="s3cret") as (_, client, url):
        with pytest.raises(openai.AuthenticationError) as raised:
            client.models.list()
        assert raised.value.code == "invalid_api_key"
        refused = HTTP.get(f"{url}/metrics")
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert is_api_error(refused) and refused.headers["x-request-id"]
        assert HTTP.get(f"{url}/health").status_code == 200
        assert [m.id for m in client.with_options(api_key="s3cret").models.list()] == ["tiny"]

        def status(authorization):
            return HTTP.get(f"{url}/v1/models", headers={"authorization": authorization}).status_code

        for wrong in ("s3cre", "s3cret1", "S3CRET", "ä", "\u00ff\u00fe"):
            assert status(f"Bearer {wrong}".encode("latin-1")) == 401
        for scheme in ("Basic s3cret", "s3cret", "Bearer", "Bearers3cret"):
            assert status(scheme) == 401
        for scheme in ("Bearer", "bearer", "BEARER", "Bearer  "):
            assert status(f"{scheme} s3cret") == 200


@pytest.mark.parametrize("key", ["schlüssel", "voilà", "\u2105", "\udcff\udca0", " spaces around "])
def test_key_may_hold_any_bytes(key, model, tokenizer):
    """Environment variables need not be UTF-8."""
    with serving(model, tokenizer, api_key=key) as (_, _, url):
        correct = b"Bearer " + key.encode("utf-8", "surrogateescape").strip()
        for authorization, status in ((correct, 200), (correct + b"x", 401), (correct[:-1], 401)):
            response = HTTP.get(f"{url}/v1/models", headers={"authorization": authorization})
            assert response.status_code == status


def test_key_is_accepted_in_utf_8_and_in_latin_1(model, tokenizer):
    with serving(model, tokenizer, api_key="schl\u00fcssel") as (_, _, url):
        for encoding in ("utf-8", "latin-1"):
            headers = {"authorization": "Bearer schl\u00fcssel".encode(encoding)}
            assert HTTP.get(f"{url}/v1/models", headers=headers).status_code == 200
        for wrong in (b"Bearer schl\xfdssel", b"Bearer schlussel", b"Bearer schl\xff\xfcssel"):
            assert HTTP.get(f"{url}/v1/models", headers={"authorization": wrong}).status_code == 401


def test_unknown_paths_and_methods_are_refused(server):
    _, _, url = server
    for response in (HTTP.get(f"{url}/v1/nothing"), HTTP.post(f"{url}/v1/embeddings"), HTTP.get(f"{url}//")):
        assert response.status_code == 404 and is_api_error(response)
    response = HTTP.get(f"{url}/v1/completions")
    assert response.status_code == 405 and is_api_error(response)
    assert response.headers["allow"] == "OPTIONS, POST"
    assert HTTP.delete(f"{url}/v1/models").headers["allow"] == "GET, HEAD, OPTIONS"


def test_trailing_slash_is_ignored(server, model, tokenizer):
    _, _, url = server
    for path in ("/v1/models", "/v1/models/tiny", "/health", "/page"):
        response = HTTP.get(f"{url}{path}/")
        assert response.status_code == 200 and response.json() == HTTP.get(url + path).json()
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
    response = HTTP.options(f"{url}/v1/completions")
    assert (response.status_code, response.headers["allow"], response.content) == (204, "OPTIONS, POST", b"")


def test_odd_hosts_and_paths_are_refused(server):
    _, _, url = server
    for host in (b"[", b"\xff", b"a b"):
        for path in ("/nothing", "/v1/completions", "/v1/models/%ed%a0%80", "/%00%0d%0a"):
            response = HTTP.get(url + path, headers={"host": host})
            assert response.status_code == 403 and is_api_error(response)
    for path in ("/v1/models/%ed%a0%80", "/%00%0d%0a"):
        assert HTTP.get(url + path).status_code == 404


def test_every_response_has_a_request_id(server):
    _, client, url = server
    responses = [HTTP.get(url + path) for path in ("/v1/models", "/v1/models", "/nothing", "/v1/completions")]
    responses.append(HTTP.post(f"{url}/v1/completions", content=b"{"))
    ids = [response.headers["x-request-id"] for response in responses]
    assert len(set(ids)) == len(ids)
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4)._request_id.startswith("req_")


def test_retry_after_is_sent_if_a_retry_can_succeed(model, tokenizer, monkeypatch):
    slow_down_steps(monkeypatch, 0.05)
    with serving(model, tokenizer, max_rows=1, max_waiting=1) as (engine, client, url):
        arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200}
        streams = [client.completions.create(**arguments, stream=True)]
        wait_until(lambda: engine.num_rows == 1)
        streams.append(client.completions.create(**arguments, stream=True))
        full = HTTP.post(f"{url}/v1/completions", json=arguments)
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        impossible = HTTP.post(f"{url}/v1/completions", json={**arguments, "n": 2})
        assert impossible.status_code == 400 and "retry-after" not in impossible.headers
        for stream in streams:
            stream.close()
        engine.stop()
        pool = {"model": "tiny", "prompt": PROMPT}
        for path, body in (("/v1/completions", arguments), ("/v1/calm/pool", pool)):
            late = HTTP.post(url + path, json=body)
            assert (late.status_code, late.headers["retry-after"]) == (503, "1") and is_api_error(late)
        assert HTTP.get(f"{url}/health").headers["retry-after"] == "1"


def test_internal_error_reports_the_request_id_of_the_log(server, monkeypatch, caplog):
    _, _, url = server
    monkeypatch.setattr(endpoint, "encode_documents", lambda *_: 1 / 0)
    response = HTTP.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert response.status_code == 500 and is_api_error(response)
    request_id = response.headers["x-request-id"]
    assert request_id in response.json()["error"]["message"] and request_id in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_internal_error_within_a_stream_reports_the_request_id(server, monkeypatch, caplog):
    _, _, url = server
    monkeypatch.setattr(formats.CompletionFormat, "_delta", lambda *_: 1 / 0)
    body = {"model": "tiny", "prompt": "a", "stream": True}
    response = HTTP.post(f"{url}/v1/completions", json=body)
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    event, end, _ = response.text.split("\n\n")
    request_id = response.headers["x-request-id"]
    assert request_id in json.loads(event.removeprefix("data: "))["error"]["message"]
    assert end == "data: [DONE]"
    assert request_id in caplog.text and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("chat", [False, True])
def test_error_within_a_stream_is_its_last_event(chat, model, tokenizer, monkeypatch):
    def failing_step(self):
        raise ValueError("the head drew a latent that is not finite")

    monkeypatch.setattr(ChunkBatch, "step", failing_step)
    with serving(model, tokenizer) as (_, client, url):
        path = "/v1/chat/completions" if chat else "/v1/completions"
        prompt = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
        body = {"model": "tiny", "stream": True, **prompt}
        events = HTTP.post(url + path, json=body).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        error = json.loads(events[-3].removeprefix("data: "))["error"]
        assert set(error) == {"message", "type", "param", "code"}
        completions = client.chat.completions if chat else client.completions
        with pytest.raises(openai.APIError, match="not finite"):
            list(completions.create(model="tiny", stream=True, **prompt))


def test_disconnect_within_a_body_is_not_logged_as_a_failure(server, caplog):
    _, client, url = server
    with connect(url) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-length: 100\r\n\r\n{")
    label = 'path="/v1/completions",status="499"'
    wait_until(lambda: label in HTTP.get(f"{url}/metrics").text)
    assert "failed" not in caplog.text and client.models.list()
