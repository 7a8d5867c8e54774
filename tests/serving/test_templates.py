"""Chat templates are untrusted programs: limits stop them, and they block nobody."""

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
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "multiplies numbers": "{{ 9 ** (9 ** 9) }}",
    "repeats a text": "{{ 'a' * 10 ** 10 }}",
    "doubles a text": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
                      "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "formats": "{{ '%9999999999d' % 1 }}",
    "pads": "{{ 'a'.ljust(10 ** 10) }}",
    "writes much": "{% for a in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "is invalid": "{% for %}",
    "breaks out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}  # fmt: skip


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_isolated_template_gives_the_same_prompts(tokenizer):
    isolated = copy.deepcopy(tokenizer)
    isolate_chat_template(isolated, 10_000, 30)
    for length in range(1, 5):
        assert encode_chat(isolated, MESSAGES[:length]) == encode_chat(tokenizer, MESSAGES[:length])
    assert end_of_turn(isolated) == end_of_turn(tokenizer)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_are_stopped(template, model, tokenizer):
    """Also at startup, when the server renders the template to see how turns end."""
    began = time.monotonic()
    with serving(model, with_template(tokenizer, template), template_seconds=1) as (_, client, url):
        body = {"model": "tiny", "messages": MESSAGES[1:2], "max_tokens": 1}
        responses, num_polls = [], 0
        ask = threading.Thread(
            target=lambda: responses.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60))
        )
        ask.start()
        while ask.is_alive():
            assert httpx.get(f"{url}/health", timeout=5).status_code == 200
            num_polls += 1
            time.sleep(0.05)
        assert num_polls and responses[0].status_code == 400
        assert "the chat template does not accept these messages" in responses[0].json()["error"]["message"]
        assert len(responses[0].content) < 2000
        assert client.completions.create(model="tiny", prompt="a", max_tokens=4).choices[0].text
    assert time.monotonic() - began < 60


def test_process_that_ended_is_restarted(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "_PROCESS", process := TemplateProcess())
    isolated = copy.deepcopy(tokenizer)
    isolate_chat_template(isolated, 10_000, 30)
    expected = encode_chat(tokenizer, MESSAGES)
    for _ in range(2):
        assert encode_chat(isolated, MESSAGES) == expected
        process._process.kill()
        process._process.wait()


def test_process_gets_no_secrets(monkeypatch):
    environments = []

    def popen(*_, env, **options):
        environments.append(env)
        raise OSError("not started")

    for name in ("CALM_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("HOME", "/home")
    monkeypatch.setattr(templates.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="not started"):
        TemplateProcess().render({}, 1)
    [environment] = environments
    assert environment["HOME"] == "/home" and "s3cret" not in environment.values()


def test_refusal_of_the_template_reaches_the_client(server, model, tokenizer):
    picky = with_template(tokenizer, "{{ raise_exception('Only one message, please.') }}")
    with serving(model, picky) as (_, _, url):
        body = {"model": "tiny", "messages": MESSAGES}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 400 and "Only one message, please." in response.text
