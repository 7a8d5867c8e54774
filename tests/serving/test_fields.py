"""Every field of the OpenAI API is honoured, ignored or refused, and null always means the default."""

import httpx
import openai
import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats
from other_tokenizers import KINDS
from serving_client import PROMPT, must_not_run, serving
from tiny import tiny_model

from calm.serving import endpoint
from calm.serving.fields import FIELDS, Honoured, Ignored
from calm.text.encoding import bos_ids

HTTP = httpx.Client(timeout=30)  # Faster than a new client for each request.
REQUIRED = {"model", "messages"}
BODIES = {
    "/v1/completions": {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "seed": 1},
    "/v1/chat/completions": {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "seed": 1,
    },
}  # fmt: skip


def fields_of(module):
    params = (module.CompletionCreateParamsNonStreaming, module.CompletionCreateParamsStreaming)
    return set().union(*(param.__required_keys__ | param.__optional_keys__ for param in params))


FIELD_NAMES = {"/v1/completions": fields_of(completions), "/v1/chat/completions": fields_of(chats)}
PATHS_AND_NAMES = [(path, name) for path, names in FIELD_NAMES.items() for name in sorted(names)]


def post(server, path, **changes):
    return HTTP.post(server.url + path, json={**BODIES[path], **changes}, timeout=30)


def test_the_table_has_every_field_of_the_client():
    assert {"max_tokens", "logit_bias", "stream", "verbosity"} <= set().union(*FIELD_NAMES.values())
    assert set().union(*FIELD_NAMES.values()) == set(FIELDS)
    for path, names in FIELD_NAMES.items():
        for name, rule in FIELDS.items():
            if isinstance(rule, Honoured):
                assert (path in rule.paths) == (name in names), name


@pytest.mark.parametrize(("path", "name"), PATHS_AND_NAMES)
def test_null_means_the_default(path, name, server):
    response = post(server, path, **{name: None})
    if name in REQUIRED:
        assert response.status_code == 400 and response.json()["error"]["message"] == f"'{name}' is missing."
    else:
        assert response.status_code == 200, response.text


def test_nulls_do_not_change_the_text(server):
    for path, names in FIELD_NAMES.items():
        nulls = dict.fromkeys(names - set(BODIES[path]))
        extensions = dict.fromkeys(("min_p", "sampler", "num_draws", "max_draws", "return_chunks"))
        choices = post(server, path, **nulls, **extensions).json()["choices"]
        assert choices == post(server, path).json()["choices"]


DEFAULTS = {
    "n": 1, "stream": False, "stop": [], "temperature": 1, "top_p": 1, "stream_options": {},
    "top_logprobs": 0,
    "user": "me", "safety_identifier": "me", "prompt_cache_key": "x", "metadata": {"a": "b"},
    "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h",
    "parallel_tool_calls": True,
    "logprobs": False, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1.0,
    "suffix": "", "tools": [], "tool_choice": "none", "functions": [], "function_call": "auto",
    "response_format": {"type": "text"}, "modalities": ["text"], "store": False, "service_tier": "auto",
    "reasoning_effort": "none", "verbosity": "medium",
}  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
def test_explicit_defaults_are_accepted(path, server):
    assert post(server, path, **DEFAULTS).json()["choices"] == post(server, path).json()["choices"]
    assert post(server, path, service_tier="default", tool_choice="auto").status_code == 200


UNSUPPORTED = {
    "logprobs": 0, "top_logprobs": 2, "logit_bias": {"5": 1}, "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "best_of": 2, "suffix": "x", "tools": [{}], "tool_choice": "required", "functions": [{}],
    "function_call": {"name": "f"}, "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "audio": {}, "store": True, "service_tier": "flex", "reasoning_effort": "low", "verbosity": "low",
    "prediction": {"type": "content", "content": "a"}, "moderation": {"model": "m"}, "web_search_options": {},
}  # fmt: skip


def test_every_unsupported_field_is_tested():
    assert set(UNSUPPORTED) == {n for n, rule in FIELDS.items() if not isinstance(rule, Honoured | Ignored)}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_values_are_refused_with_a_reason(name, server):
    for path in BODIES:
        error = post(server, path, **{name: UNSUPPORTED[name]}).json()["error"]
        assert f"'{name}' is not supported: " in error["message"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", [name for name, rule in FIELDS.items() if isinstance(rule, Ignored)])
def test_types_of_ignored_fields_are_checked(name, server):
    error = post(server, "/v1/completions", **{name: 3}).json()["error"]
    assert error["param"] == name and "got a number" in error["message"]


def test_refusal_lists_the_accepted_values(server):
    error = post(server, "/v1/chat/completions", tool_choice="required").json()["error"]
    assert error["message"].endswith('Leave it out or send "none" or "auto" or null.')
    error = post(server, "/v1/chat/completions", audio={}).json()["error"]
    assert error["message"].endswith("Leave it out or send null.")


def test_low_token_limit_applies_where_no_length_is_given(model, tokenizer):
    with serving(model, tokenizer, max_tokens=8) as (_, client, _):
        assert client.completions.create(model="tiny", prompt=PROMPT).usage.completion_tokens == 8


def test_field_of_another_path_is_refused_as_such(server):
    for path, name, value in (
        ("/v1/chat/completions", "echo", True),
        ("/v1/chat/completions", "prompt", "a"),
        ("/v1/completions", "max_completion_tokens", 3),
        ("/v1/completions", "messages", []),
    ):
        error = post(server, path, **{name: value}).json()["error"]
        assert f"'{name}' is an argument of /v1/" in error["message"] and error["param"] == name


@pytest.mark.parametrize("name", ["max_tokens", "n", "seed", "num_draws", "max_draws"])
def test_integers_may_be_written_as_floats_but_nothing_else(name, server):
    expected = post(server, "/v1/completions", **{name: 16})
    assert post(server, "/v1/completions", **{name: 16.0}).json()["choices"] == expected.json()["choices"]
    for wrong in (16.5, True, "16", [16], {}):
        response = post(server, "/v1/completions", **{name: wrong})
        assert response.status_code == 400 and response.json()["error"]["param"] == name


def test_token_ids_may_be_written_as_floats(server):
    path = "/v1/completions"
    expected = post(server, path, prompt=[40, 41], echo=True).json()["choices"]
    assert post(server, path, prompt=[40.0, 41.0], echo=True).json()["choices"] == expected


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "stream", "echo", "return_chunks"])
def test_values_of_other_types_are_not_converted(name, server):
    wrong = [1, "true", [], {}] if name in ("stream", "echo", "return_chunks") else [True, "1", [], {}]
    for value in wrong:
        response = post(server, "/v1/completions", **{name: value})
        assert response.status_code == 400 and response.json()["error"]["param"] == name


INVALID = {
    "a number": ({"prompt": 3}, "prompt", "prompt: must be a string, an array of token ids, or an array"),
    "mixed": ({"prompt": ["a", 1]}, "prompt[1]", "prompt[1]: must be a string like those before it, got a n"),
    "text in ids": (
        {"prompt": [1, "a"]},
        "prompt[1]",
        "prompt[1]: token ids must be whole numbers, got a string",
    ),
    "fraction": ({"prompt": [1, 2.5]}, "prompt[1]", "prompt[1]: token ids must be whole numbers, got 2.5."),
    "ids in ids": ({"prompt": [[1], [2, True]]}, "prompt[1][1]", "token ids must be whole numbers"),
    "null in prompts": (
        {"prompt": ["a", None]},
        "prompt[1]",
        "prompt[1]: must be a string like those before",
    ),
    "an unknown id": (
        {"prompt": [[1], [999]]},
        "prompt[1]",
        "token ids in 'prompt[1]' must be between 0 and 319",
    ),
    "no ids": ({"prompt": [[1], []]}, "prompt[1]", "prompt[1]: a prompt is empty; give a text."),
    "stop": ({"stop": {"a": 1}}, "stop", "stop: must be a string or an array of strings, got an object."),
    "null in stops": ({"stop": ["a", None]}, "stop[1]", "stop[1]: must be a string, got null."),
    "many stops": ({"stop": ["a"] * 17}, "stop", "up to 16 texts, got 17"),
    "a long stop": ({"stop": "a" * 1001}, "stop", "longer than 1000 characters"),
    "stream options": (
        {"stream_options": 3},
        "stream_options",
        "stream_options: must be an object, got a",
    ),
    "a stream option": (
        {"stream_options": {"include_usage": 3}},
        "stream_options.include_usage",
        "stream_options.include_usage: Input should be a valid boolean.",
    ),
    "unknown option": ({"stream_options": {"x": 1}}, "stream_options.x", "no argument 'stream_options.x'"),
    "metadata": ({"metadata": {"a": 1}}, "metadata", "values of 'metadata' must be strings"),
    "much metadata": (
        {"metadata": {str(n): "a" for n in range(17)}},
        "metadata",
        "'metadata' may have at most 16 pairs, got 17.",
    ),
    "a long key": ({"metadata": {"a" * 65: "b"}}, "metadata", "may have at most 64 characters"),
    "a long value": ({"metadata": {"a": "b" * 513}}, "metadata", "and values at most 512"),
    "nearly cold": ({"temperature": 1e-310}, "temperature", "a temperature above 0 must be at least"),
    "few draws": (
        {"temperature": 0.1, "num_draws": 2, "sampler": "pool"},
        "num_draws",
        "num_draws=2",
    ),
    "a seed beyond 64 bits": ({"seed": 2**63}, "seed", "seed: Input should be less than or equal to"),
    "unknown and null": ({"color": None}, "color", "there is no argument 'color'"),
    "a line break in a name": ({"a\nb": 1}, "a\\nb", "there is no argument 'a\\nb'"),
    "a long name": ({"x" * 500: 1}, "x" * 80 + "...", "there is no argument"),
}


@pytest.mark.parametrize(("changes", "param", "message"), INVALID.values(), ids=INVALID)
def test_errors_are_one_sentence_and_name_the_field(changes, param, message, server):
    error = post(server, "/v1/completions", **changes).json()["error"]
    assert error["param"] == param and message in error["message"]
    assert len(error["message"]) < 300 and "\n" not in error["message"]


@pytest.mark.parametrize("kind", ["llama", "llama with an end"])
def test_missing_prompt_starts_from_bos(kind):
    tokenizer = KINDS[kind]()
    with serving(tiny_model(4, vocab_size=len(tokenizer)), tokenizer) as (_, client, url):
        arguments = {"model": "tiny", "max_tokens": 8, "seed": 1}
        bos = bos_ids(tokenizer)
        expected = client.completions.create(prompt=bos, **arguments)
        for prompt in ({"prompt": None}, {}, {"prompt": ""}):
            response = HTTP.post(f"{url}/v1/completions", json={**arguments, **prompt}).json()
            assert response["choices"][0]["text"] == expected.choices[0].text
            assert response["usage"]["prompt_tokens"] == len(bos) == 1


def test_prompt_is_required_without_a_bos_token():
    tokenizer = KINDS["words"]()
    assert bos_ids(tokenizer) == []
    with serving(tiny_model(4, vocab_size=len(tokenizer)), tokenizer) as (_, client, _):
        with pytest.raises(openai.BadRequestError, match="tokenizer has no BOS token; give a text") as raised:
            client.completions.create(model="tiny", prompt=None)
        assert raised.value.param == "prompt"


def test_impossible_requests_are_refused_before_encoding(server, monkeypatch):
    monkeypatch.setattr(endpoint, "encode_documents", must_not_run)
    monkeypatch.setattr(endpoint, "encode_chat", must_not_run)
    for changes, count, param in (
        ({"prompt": ["a"] * 100_000, "n": 128}, 12_800_000, "prompt"),
        ({"prompt": [[1]] * 257}, 257, "prompt"),
        ({"prompt": ["a"] * 3, "n": 100}, 300, "n"),
    ):
        response = post(server, "/v1/completions", **changes)
        assert response.status_code == 400 and response.json()["error"]["param"] == param
        assert f"asks for {count} texts, but at most 256" in response.json()["error"]["message"]
    for changes in ({"max_tokens": 5000}, {"tools": [{}]}, {"temperature": 2}, {"sampler": "head"}):
        for path in BODIES:
            assert post(server, path, **changes).status_code == 400
    error = post(server, "/v1/chat/completions", max_completion_tokens=5000).json()["error"]
    assert error["param"] == "max_completion_tokens"
