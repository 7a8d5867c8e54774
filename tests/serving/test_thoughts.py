"""Continuous thoughts over HTTP: those of a request match `generate`, and have limits."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving_client import PROMPT, generate_text, must_not_run, serving
from tiny import EOS, thinking_model
from toy import failure

from calm.serving import endpoint
from calm.text.chat import encode_chat
from calm.texts import continue_tokens

PATHS = {
    "/v1/completions": {"prompt": PROMPT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/calm/pool": {"prompt": PROMPT},
}
TRAINED = 3


@pytest.fixture(scope="module")
def thinker():
    return thinking_model(TRAINED, vocab_size=320)


@pytest.fixture(scope="module")
def thinking_server(thinker, tokenizer):
    with serving(thinker, tokenizer) as server:
        yield server


def post(server, path="/v1/completions", **changes):
    return httpx.post(server.url + path, json={"model": "tiny", **PATHS[path], **changes}, timeout=30)


def text_of(response):
    [choice] = response.json()["choices"]
    return choice["text"]


@pytest.mark.parametrize("head_type", ["sequential", "categorical_flow"])
def test_texts_match_generate_after_as_many_thoughts(head_type, tokenizer):
    """Concurrent requests with the same prompt and seed do not share thoughts."""
    model = thinking_model(TRAINED, head_type=head_type, vocab_size=320)
    numbers = [None, 0, 1, TRAINED, 20] * 2
    expected = {
        number: generate_text(
            model, tokenizer, PROMPT, max_new_tokens=12, seed=1, temperature=1.0, num_thoughts=number
        )
        for number in numbers
    }
    assert expected[None] == expected[TRAINED] and len(set(expected.values())) == 4
    settings = {"max_tokens": 12, "seed": 1, "temperature": 1}
    with serving(model, tokenizer) as server, ThreadPoolExecutor(len(numbers)) as threads:
        futures = [threads.submit(post, server, num_thoughts=number, **settings) for number in numbers]
        assert [text_of(future.result()) for future in futures] == [expected[number] for number in numbers]


def test_chat_matches_generate(thinking_server, thinker, tokenizer):
    prompt = encode_chat(tokenizer, PATHS["/v1/chat/completions"]["messages"])
    for number in (None, 0, 7):
        settings = {"max_new_tokens": 8, "seed": 2, "temperature": 0.0, "num_thoughts": number}
        expected = continue_tokens(thinker, tokenizer, [prompt], **settings)[0].tolist()
        response = post(
            thinking_server, "/v1/chat/completions", max_tokens=8, seed=2, temperature=0, num_thoughts=number,
            return_chunks=True,
        ).json()  # fmt: skip
        chunks = response["choices"][0]["chunks"]
        written = [token for chunk in chunks for token in chunk["token_ids"]]
        assert written == expected[: len(written)] and len(chunks) >= 1


@pytest.mark.parametrize(
    ("fields", "num_thoughts"), [({}, TRAINED), ({"num_thoughts": 5, "n": 2}, 10), ({"num_thoughts": 0}, 0)]
)
def test_thoughts_count_as_reasoning_tokens(fields, num_thoughts, thinking_server):
    arguments = {"max_tokens": 8, "seed": 1, "temperature": 1, "return_chunks": True, **fields}
    response = post(thinking_server, **arguments).json()
    usage, written = response["usage"], 0
    for choice in response["choices"]:
        written += sum(len(chunk["token_ids"]) for chunk in choice["chunks"])
    assert usage["completion_tokens"] == written + num_thoughts
    assert usage["total_tokens"] == usage["prompt_tokens"] + written + num_thoughts
    details = {"completion_tokens_details": {"reasoning_tokens": num_thoughts}} if num_thoughts else {}
    assert {name: value for name, value in usage.items() if name.endswith("details")} == details


def test_stream_ends_with_the_number_of_reasoning_tokens(thinking_server):
    _, client, _ = thinking_server
    events = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=8, stream=True, stream_options={"include_usage": True},
        extra_body={"num_thoughts": 4},
    )  # fmt: skip
    assert [*events][-1].usage.completion_tokens_details.reasoning_tokens == 4


@pytest.mark.parametrize("number", [None, 0, 12])
def test_pools_follow_the_same_thoughts_as_the_text(number, thinking_server, thinker, tokenizer):
    """At temperature 0 a chunk has probability 1 in its own pool, but not after other thoughts."""
    settings = {"max_new_tokens": 12, "temperature": 0.0, "num_thoughts": number}
    ids = tokenizer(PROMPT)["input_ids"]
    text = continue_tokens(thinker, tokenizer, [ids], **settings)[0].tolist()
    text = text[: text.index(EOS)] if EOS in text else text
    is_certain = []
    for num_thoughts in (number, 5):
        for start in range(0, len(text) // 4 * 4, 4):
            chunk = text[start : start + 4]
            body = {"written": text[:start], "chunk": chunk, "temperatures": [0.0], "num_draws": 8}
            pool = post(thinking_server, "/v1/calm/pool", num_thoughts=num_thoughts, **body).json()
            [candidate] = [c for c in pool["candidates"] if c["token_ids"] == chunk]
            is_certain.append(candidate["probabilities"] == [1.0])
    half = len(is_certain) // 2
    assert half and all(is_certain[:half]) and not all(is_certain[half:])


@pytest.mark.parametrize("path", PATHS)
def test_invalid_numbers_are_refused(path, thinking_server):
    for wrong in (2.5, True, "3", [3], {}):
        error = post(thinking_server, path, num_thoughts=wrong).json()["error"]
        assert error["param"] == "num_thoughts" and len(error["message"]) < 100
    error = post(thinking_server, path, num_thoughts=-1).json()["error"]
    assert error["message"] == "num_thoughts: Input should be greater than or equal to 0."
    for many in (65, 10**30):
        error = post(thinking_server, path, num_thoughts=many).json()["error"]
        assert (error["message"], error["param"]) == ("'num_thoughts' must be at most 64.", "num_thoughts")
    for fine in (None, 2.0, 0):
        assert post(thinking_server, path, num_thoughts=fine).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_other_models_refuse_thoughts(path, server):
    error = post(server, path, num_thoughts=3).json()["error"]
    assert error["message"] == (
        "this model was not trained to think, so 'num_thoughts' cannot be 3; leave it out."
    )
    assert (error["param"], error["code"]) == ("num_thoughts", "unsupported_parameter")
    for fine in (None, 0):
        assert post(server, path, num_thoughts=fine).status_code == 200


def test_max_thoughts_limits_requests(thinker, tokenizer):
    with serving(thinker, tokenizer, max_thoughts=5) as server:
        assert post(server, num_thoughts=5, max_tokens=4).status_code == 200
        assert "must be at most 5" in post(server, num_thoughts=6).json()["error"]["message"]
    with serving(thinker, tokenizer, max_thoughts=20_000) as server:
        assert "at most 10,000, got 15000" in post(server, num_thoughts=15_000).json()["error"]["message"]


def test_max_thoughts_must_allow_the_models_own_number(tmp_path, tokenizer, capsys):
    thinking_model(TRAINED, vocab_size=320).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    message = failure(capsys, "serve", tmp_path, "--max_thoughts", "2", "--port", "0")
    assert "uses 3 thoughts per text, but max_thoughts is 2; raise it" in message
    assert "max_thoughts must be above 0" in failure(capsys, "serve", tmp_path, "--max_thoughts", "0")


def test_thoughts_take_room_in_the_context(thinking_server):
    """The context has 64 chunks: beside a prompt of one, 41 thoughts and two markers leave 20."""
    request = {"prompt": [5, 6, 7, 8], "num_thoughts": 41}
    assert post(thinking_server, max_tokens=80, **request).status_code == 200
    error = post(thinking_server, max_tokens=81, **request).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert error["message"] == (
        "the prompt has 4 tokens, thoughts and their markers take 172, and 81 new tokens are requested, more "
        "than the context of 256; request at most 80, or shorten the prompt, or use fewer thoughts."
    )
    usage = post(thinking_server, "/v1/chat/completions", num_thoughts=55).json()["usage"]
    assert usage["completion_tokens"] - 55 <= 256 - 4 * 57 - usage["prompt_tokens"]
    pool = {"prompt": [5] * 4, "written": [5] * 80, "num_thoughts": 41}
    error = post(thinking_server, "/v1/calm/pool", **pool).json()["error"]
    assert "no room for another chunk" in error["message"]
    assert post(thinking_server, "/v1/calm/pool", **pool | {"num_thoughts": 40}).status_code == 200


def test_thoughts_count_towards_the_tokens_of_a_request(thinker, tokenizer, monkeypatch):
    """They are counted before anything is encoded."""
    with serving(thinker, tokenizer, max_request_tokens=200) as server:
        assert post(server, prompt=[5, 6], n=2, max_tokens=8, num_thoughts=20).status_code == 200
        monkeypatch.setattr(endpoint, "encode_documents", must_not_run)
        response = post(server, n=2, max_tokens=8, num_thoughts=22)
        assert "total up to 208 tokens, but at most 200" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_reasoning_effort_is_refused_in_favour_of_num_thoughts(path, thinking_server):
    def refusal(**fields):
        return post(thinking_server, path, max_tokens=4, **fields).json()["error"]["message"]

    assert "the number of thoughts is set by 'num_thoughts'." in refusal(reasoning_effort="low")
    message = refusal(reasoning_effort="none")
    assert message == "'reasoning_effort' is \"none\", but this model thinks; send 'num_thoughts': 0 as well."
    response = post(thinking_server, path, reasoning_effort="none", num_thoughts=0, max_tokens=4)
    assert response.status_code == 200 and "completion_tokens_details" not in response.json()["usage"]


def test_page_is_told_about_thoughts(thinking_server, server):
    pages = [httpx.get(f"{url}/page").json() for _, _, url in (thinking_server, server)]
    assert [page["num_thoughts"] for page in pages] == [TRAINED, None]
    assert [page["max_thoughts"] for page in pages] == [64, 64]
