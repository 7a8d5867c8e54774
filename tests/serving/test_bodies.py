"""Request bodies: JSON objects under any content type; anything else is refused in one sentence."""

import json

import httpx
import openai
import pytest
from serving_client import PROMPT, is_api_error, serving

from calm.serving.bodies import parse_object
from calm.serving.errors import ApiError

HTTP = httpx.Client(timeout=30)  # Faster than a new client for each request.
MESSAGES = [{"role": "user", "content": "Hello"}]
REQUESTS = {
    "/v1/completions": {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "seed": 1},
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "seed": 1},
    "/v1/calm/pool": {"model": "tiny", "prompt": PROMPT, "num_draws": 16, "seed": 1},
}
FORM = "application/x-www-form-urlencoded"


def result_of(response):
    response = response.json()
    return response["choices"] if "choices" in response else response["candidates"]


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize(
    "content_type", [None, FORM, "text/plain", "application/json; charset=utf-8", "application/pdf", "odd"]
)
def test_body_is_read_as_json_under_any_content_type(content_type, path, server):
    _, _, url = server
    expected = HTTP.post(url + path, json=REQUESTS[path])
    headers = {} if content_type is None else {"content-type": content_type}
    response = HTTP.post(url + path, content=json.dumps(REQUESTS[path]).encode(), headers=headers)
    assert response.status_code == 200 and result_of(response) == result_of(expected)


NOT_OBJECTS = {
    "empty": (b"", "the body is empty"),
    "blank": (b" \n", "the body is empty"),
    "array": (b"[]", "the body is an array"),
    "number": (b"3", "the body is a number"),
    "string": (b'"x"', "the body is a string"),
    "null": (b"null", "the body is null"),
    "boolean": (b"true", "the body is a boolean"),
    "a truncated object": (b"{", "not valid JSON"),
    "form": (b"model=tiny&prompt=Once", "not valid JSON"),
    "two objects": (b'{"model": "tiny"} {}', "not valid JSON"),
    "single quotes": (b"{'model': 'tiny'}", "not valid JSON"),
    "invalid UTF-8": (b'{"model": "\xff"}', "not UTF-8 (byte 11)"),
    "a surrogate's bytes": (b'{"model": "\xed\xa0\x80"}', "not UTF-8"),
    "UTF-16": ('{"model": "tiny"}'.encode("utf-16"), "in UTF-16"),
    "UTF-16 without a mark": ('{"model": "tiny"}'.encode("utf-16-be"), "in UTF-16"),
    "UTF-32": ('{"model": "tiny"}'.encode("utf-32"), "in UTF-32"),
    "NaN": (b'{"temperature": NaN}', "not valid JSON"),
    "infinity": (b'{"temperature": -Infinity}', "not valid JSON"),
    "arrays in arrays": (b"[" * 100_000, "nested too deeply"),
    "objects in objects": (b'{"a":' * 100_000, "nested too deeply"),
    "900 closed arrays": (b'{"metadata":' + b"[" * 900 + b"]" * 900 + b"}", "nested too deeply"),
    "a number of many digits": (b'{"seed": ' + b"9" * 5000 + b"}", "number out of range"),
    "a high surrogate": (b'{"prompt": "\\ud800"}', "a lone surrogate"),
    "a low surrogate": (b'{"prompt": "\\udc00 a"}', "a lone surrogate"),
    "a truncated escape": (b'{"prompt": "\\u12', "JSON"),
}


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize(("body", "message"), NOT_OBJECTS.values(), ids=NOT_OBJECTS)
def test_bodies_that_are_not_json_objects_are_refused(body, message, path, server):
    _, _, url = server
    for content_type in ("application/json", FORM):
        response = HTTP.post(url + path, content=body, headers={"content-type": content_type})
        assert response.status_code == 400 and is_api_error(response)
        assert message in response.json()["error"]["message"]


def test_byte_order_mark_is_skipped():
    assert parse_object(b'\xef\xbb\xbf{"a": "\xc3\xa4"}') == {"a": "ä"}
    with pytest.raises(ApiError, match="empty"):
        parse_object(b"\xef\xbb\xbf")


def test_escaped_surrogate_pairs_are_decoded():
    assert parse_object(rb'{"a": "\ud83d\ude00"}') == {"a": "😀"}


def test_number_beyond_float_range_is_refused_at_its_field(server):
    _, _, url = server
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        body = f'{{"model": "tiny", "prompt": "a", "{name}": 1e999}}'
        response = HTTP.post(f"{url}/v1/completions", content=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == name


@pytest.mark.parametrize("path", REQUESTS)
def test_body_over_the_limit_is_refused(path, model, tokenizer):
    with serving(model, tokenizer, max_body=1000) as (_, client, url):
        with pytest.raises(openai.APIStatusError, match="exceeds the limit of 1000 bytes") as raised:
            client.post(path.removeprefix("/v1"), body={"model": "a" * 1000}, cast_to=object)
        assert raised.value.status_code == 413
        # A body without a content-length header.
        response = HTTP.post(url + path, content=(b"a" * 100 for _ in range(11)))
        assert response.status_code == 413 and is_api_error(response)
        body = json.dumps(REQUESTS[path]).encode()
        assert HTTP.post(url + path, content=body.ljust(1000)).status_code == 200


def test_compressed_body_is_refused_as_such(server):
    _, _, url = server
    response = HTTP.post(f"{url}/v1/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert response.status_code == 415 and "compressed" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", REQUESTS)
def test_multipart_form_is_refused_as_such(path, server):
    _, _, url = server
    for response in (
        HTTP.post(url + path, files={"model": b"tiny"}),
        HTTP.post(url + path, content=b"{}", headers={"content-type": "Multipart/Form-Data; boundary=x"}),
    ):
        assert response.status_code == 400 and is_api_error(response)
        assert "multipart form data; send a JSON object" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", REQUESTS)
def test_pages_of_other_origins_cannot_send_forms(path, server):
    """Browsers send forms to another origin without asking; before JSON they ask, and get no permission."""
    _, _, url = server
    body = json.dumps(REQUESTS[path]).encode()

    def status(origin, **headers):
        return HTTP.post(url + path, content=body, headers={"origin": origin, **headers}).status_code

    own_origin = url
    for content_type in (FORM, "text/plain", "text/plain; application/json", "multipart/form-data"):
        headers = {"content-type": content_type}
        assert status("http://elsewhere.example", **headers) == status("null", **headers) == 403
        assert status(own_origin.replace("http:", "https:"), **headers) == 403
        assert status(own_origin, **headers) == (400 if "multipart" in content_type else 200)
    assert status("http://elsewhere.example") == 403, "no content type at all"
    assert status("http://elsewhere.example", **{"content-type": "Application/JSON; charset=utf-8"}) == 200
    preflight = HTTP.options(
        url + path, headers={"origin": "http://elsewhere.example", "access-control-request-method": "POST"}
    )
    assert "access-control-allow-origin" not in preflight.headers
