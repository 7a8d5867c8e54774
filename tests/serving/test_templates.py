"""Chat templates are programs of strangers: they stop at limits, and hold nobody up."""

import copy
import threading
import time

import httpx
import pytest
from serving_client import serving

from calm.serving import templates
from calm.serving.templates import TemplateProcess, isolate_chat_template
from calm.text.chat import encode_chat, end_of_turn

MESSAGES = [
    {"role": "system", "content": "Be <|eos|> \ue0f0 brief. \u4f60\u597d \U0001f600"},
    {"role": "user", "content": 'He said "no".\n\x00'},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Go on"},
]
EVIL = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "multiplies numbers": "{{ 9 ** (9 ** 9) }}",
    "repeats a text": "{{ 'a' * 10 ** 10 }}",
    "doubles a text": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
                      "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "formats": "{{ '%9999999999d' % 1 }}",
    "pads": "{{ 'a'.ljust(10 ** 10) }}",
    "writes much": "{% for a in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "is none": "{% for %}",
    "breaks out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}  # fmt: skip


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_the_other_process_writes_the_same(tokenizer):
    elsewhere = copy.deepcopy(tokenizer)
    isolate_chat_template(elsewhere, 10_000, 30)
    for length in range(1, 5):
        assert encode_chat(elsewhere, MESSAGES[:length]) == encode_chat(tokenizer, MESSAGES[:length])
    assert end_of_turn(elsewhere) == end_of_turn(tokenizer)


@pytest.mark.parametrize("template", EVIL.values(), ids=EVIL)
def test_what_loops_or_explodes_stops(template, model, tokenizer):
    """Also before the server is there, which looks how answers end."""
    began = time.monotonic()
    with serving(model, with_template(tokenizer, template), template_seconds=1) as (_, client, url):
        body = {"model": "tiny", "messages": MESSAGES[1:2], "max_tokens": 1}
        answers, beats = [], 0
        ask = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60))
        )
        ask.start()
        while ask.is_alive():
            assert httpx.get(f"{url}/health", timeout=5).status_code == 200
            beats += 1
            time.sleep(0.05)
        assert beats and answers[0].status_code == 400
        assert "the chat template does not accept these messages" in answers[0].json()["error"]["message"]
        assert len(answers[0].content) < 2000
        assert client.completions.create(model="tiny", prompt="a", max_tokens=4).choices[0].text
    assert time.monotonic() - began < 60


def test_a_process_that_ends_is_started_again(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "_PROCESS", process := TemplateProcess())
    monkeypatch.setenv("CALM_API_KEY", "s3cret")
    elsewhere = copy.deepcopy(tokenizer)
    isolate_chat_template(elsewhere, 10_000, 30)
    expected = encode_chat(tokenizer, MESSAGES)
    for _ in range(2):
        assert encode_chat(elsewhere, MESSAGES) == expected
        process._process.kill()
        process._process.wait()


def test_what_a_template_refuses_is_told(server, model, tokenizer):
    picky = with_template(tokenizer, "{{ raise_exception('Only one message, please.') }}")
    with serving(model, picky) as (_, _, url):
        body = {"model": "tiny", "messages": MESSAGES}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 400 and "Only one message, please." in answer.text
