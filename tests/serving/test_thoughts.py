"""A model that thinks, over HTTP: the thoughts of a request are those of `generate`, and have limits."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving_client import PROMPT, alone, serving
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
def running(thinker, tokenizer):
    with serving(thinker, tokenizer) as server:
        yield server


def post(server, path="/v1/completions", **changes):
    return httpx.post(server[2] + path, json={"model": "tiny", **PATHS[path], **changes}, timeout=30)


def text_of(answer):
    [choice] = answer.json()["choices"]
    return choice["text"]


@pytest.mark.parametrize("head_type", ["sequential", "categorical_flow"])
def test_texts_are_those_of_generate_after_as_many_thoughts(head_type, tokenizer):
    """Equal prompts with the same seed are asked for at the same time, and none gets another's thoughts."""
    model = thinking_model(TRAINED, head_type=head_type, vocab_size=320)
    numbers = [None, 0, 1, TRAINED, 20] * 2
    expected = {
        number: alone(
            model, tokenizer, PROMPT, max_new_tokens=12, seed=1, temperature=1.0, num_thoughts=number
        )
        for number in numbers
    }
    assert expected[None] == expected[TRAINED] and len(set(expected.values())) == 4
    how = {"max_tokens": 12, "seed": 1, "temperature": 1}
    with serving(model, tokenizer) as server, ThreadPoolExecutor(len(numbers)) as threads:
        asked = [threads.submit(post, server, num_thoughts=number, **how) for number in numbers]
        assert [text_of(one.result()) for one in asked] == [expected[number] for number in numbers]


def test_an_answer_in_a_chat(running, thinker, tokenizer):
    prompt = encode_chat(tokenizer, PATHS["/v1/chat/completions"]["messages"])
    for number in (None, 0, 7):
        how = {"max_new_tokens": 8, "seed": 2, "temperature": 0.0, "num_thoughts": number}
        expected = continue_tokens(thinker, tokenizer, [prompt], **how)[0].tolist()
        answer = post(
            running, "/v1/chat/completions", max_tokens=8, seed=2, temperature=0, num_thoughts=number,
            return_chunks=True,
        ).json()  # fmt: skip
        chunks = answer["choices"][0]["chunks"]
        written = [token for chunk in chunks for token in chunk["token_ids"]]
        assert written == expected[: len(written)] and len(chunks) >= 1


@pytest.mark.parametrize(
    ("asked", "thought"), [({}, TRAINED), ({"num_thoughts": 5, "n": 2}, 10), ({"num_thoughts": 0}, 0)]
)
def test_thoughts_are_tokens_of_reasoning(asked, thought, running):
    how = {"max_tokens": 8, "seed": 1, "temperature": 1, "return_chunks": True, **asked}
    answer = post(running, **how).json()
    usage, written = answer["usage"], 0
    for choice in answer["choices"]:
        written += sum(len(chunk["token_ids"]) for chunk in choice["chunks"])
    assert usage["completion_tokens"] == written + thought
    assert usage["total_tokens"] == usage["prompt_tokens"] + written + thought
    details = {"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {}
    assert {name: one for name, one in usage.items() if name.endswith("details")} == details


def test_a_stream_counts_them_at_its_end(running):
    _, client, _ = running
    events = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=8, stream=True, stream_options={"include_usage": True},
        extra_body={"num_thoughts": 4},
    )  # fmt: skip
    assert [*events][-1].usage.completion_tokens_details.reasoning_tokens == 4


@pytest.mark.parametrize("number", [None, 0, 12])
def test_the_pool_after_thoughts_is_what_the_text_was_written_from(number, running, thinker, tokenizer):
    """At temperature 0 each chunk is what its own pool is sure of, and not that after other thoughts."""
    how = {"max_new_tokens": 12, "temperature": 0.0, "num_thoughts": number}
    ids = tokenizer(PROMPT)["input_ids"]
    text = continue_tokens(thinker, tokenizer, [ids], **how)[0].tolist()
    text = text[: text.index(EOS)] if EOS in text else text
    sure = []
    for asked in (number, 5):
        for place in range(0, len(text) // 4 * 4, 4):
            body = {"written": text[:place], "chunk": text[place : place + 4], "temperatures": [0.0]}
            pool = post(running, "/v1/calm/pool", num_draws=8, num_thoughts=asked, **body).json()
            [own] = [one for one in pool["candidates"] if one["token_ids"] == text[place : place + 4]]
            sure.append(own["probabilities"] == [1.0])
    half = len(sure) // 2
    assert half and all(sure[:half]) and not all(sure[half:])


@pytest.mark.parametrize("path", PATHS)
def test_bad_numbers(path, running):
    for wrong in (2.5, True, "3", [3], {}):
        error = post(running, path, num_thoughts=wrong).json()["error"]
        assert error["param"] == "num_thoughts" and len(error["message"]) < 100
    error = post(running, path, num_thoughts=-1).json()["error"]
    assert error["message"] == "num_thoughts: Input should be greater than or equal to 0."
    for many in (65, 10**30):
        error = post(running, path, num_thoughts=many).json()["error"]
        assert (error["message"], error["param"]) == ("'num_thoughts' must be at most 64.", "num_thoughts")
    for fine in (None, 2.0, 0):
        assert post(running, path, num_thoughts=fine).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_was_not_trained_to_think(path, server):
    error = post(server, path, num_thoughts=3).json()["error"]
    assert error["message"] == (
        "this model was not trained to think, so 'num_thoughts' cannot be 3; leave it out."
    )
    assert (error["param"], error["code"]) == ("num_thoughts", "unsupported_parameter")
    for fine in (None, 0):
        assert post(server, path, num_thoughts=fine).status_code == 200


def test_a_limit_of_its_own(thinker, tokenizer):
    with serving(thinker, tokenizer, max_thoughts=5) as server:
        assert post(server, num_thoughts=5, max_tokens=4).status_code == 200
        assert "must be at most 5" in post(server, num_thoughts=6).json()["error"]["message"]
    with serving(thinker, tokenizer, max_thoughts=20_000) as server:
        assert "at most 10,000, got 15000" in post(server, num_thoughts=15_000).json()["error"]["message"]


def test_a_server_that_allows_fewer_thoughts_than_its_model_takes(tmp_path, tokenizer, capsys):
    thinking_model(TRAINED, vocab_size=320).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = failure(capsys, "serve", tmp_path, "--max_thoughts", "2", "--port", "0")
    assert "uses 3 thoughts per text, but max_thoughts is 2; raise it" in said
    assert "max_thoughts must be above 0" in failure(capsys, "serve", tmp_path, "--max_thoughts", "0")


def test_thoughts_take_room(running, monkeypatch):
    """The context has 64 chunks: beside a prompt of one, 41 thoughts and two markers leave 20."""
    asked = {"prompt": [5, 6, 7, 8], "num_thoughts": 41}
    assert post(running, max_tokens=80, **asked).status_code == 200
    error = post(running, max_tokens=81, **asked).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert error["message"] == (
        "the prompt has 4 tokens, thoughts and their markers take 172, and 81 new tokens are requested, more "
        "than the context of 256; request at most 80, or shorten the prompt, or use fewer thoughts."
    )
    usage = post(running, "/v1/chat/completions", num_thoughts=55).json()["usage"]
    assert usage["completion_tokens"] - 55 <= 256 - 4 * 57 - usage["prompt_tokens"]
    pool = {"prompt": [5] * 4, "written": [5] * 80, "num_thoughts": 41}
    assert "no room for another chunk" in post(running, "/v1/calm/pool", **pool).json()["error"]["message"]
    assert post(running, "/v1/calm/pool", **pool | {"num_thoughts": 40}).status_code == 200


def test_thoughts_of_all_texts_together(thinker, tokenizer, monkeypatch):
    """They are counted before anything is read."""
    with serving(thinker, tokenizer, max_request_tokens=200) as server:
        assert post(server, prompt=[5, 6], n=2, max_tokens=8, num_thoughts=20).status_code == 200
        monkeypatch.setattr(endpoint, "encode_documents", lambda *_: asyncio.sleep(None))
        answer = post(server, n=2, max_tokens=8, num_thoughts=22)
        assert "total up to 208 tokens, but at most 200" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_effort_is_a_number_of_thoughts_here(path, running):
    def refused(**asked):
        return post(running, path, max_tokens=4, **asked).json()["error"]["message"]

    assert "the number of thoughts is set by 'num_thoughts'." in refused(reasoning_effort="low")
    said = refused(reasoning_effort="none")
    assert said == "'reasoning_effort' is \"none\", but this model thinks; send 'num_thoughts': 0 as well."
    answer = post(running, path, reasoning_effort="none", num_thoughts=0, max_tokens=4)
    assert answer.status_code == 200 and "completion_tokens_details" not in answer.json()["usage"]


def test_what_the_page_is_told_of_thoughts(running, server):
    told = [httpx.get(f"{url}/page").json() for _, _, url in (running, server)]
    assert [about["num_thoughts"] for about in told] == [TRAINED, None]
    assert [about["max_thoughts"] for about in told] == [64, 64]
