"""The server, through the OpenAI client."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving_client import PROMPT, generate_text, serving, wait_until
from tiny import tiny_model

from calm.texts import continue_texts


def test_models_are_listed(server):
    _, client, _ = server
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "calm"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("other")
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_completion_matches_generate(server, model, tokenizer, temperature):
    _, client, _ = server
    response = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=temperature, seed=7,
        extra_body={"max_draws": 16, "num_draws": 16},
    )  # fmt: skip
    expected = generate_text(
        model,
        tokenizer,
        PROMPT,
        max_new_tokens=24,
        temperature=temperature,
        seed=7,
        max_draws=16,
        num_draws=16,
    )
    [choice] = response.choices
    assert choice.text == expected and choice.finish_reason == "length" and choice.logprobs is None
    assert response.object == "text_completion" and response.id.startswith("cmpl-")
    assert response.usage.completion_tokens == 24
    assert response.usage.prompt_tokens == len(tokenizer(PROMPT)["input_ids"])
    assert response.usage.total_tokens == 24 + response.usage.prompt_tokens


def test_the_same_seed_gives_the_same_text(server):
    _, client, _ = server

    def text(**arguments):
        return (
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, **arguments).choices[0].text
        )

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()


def test_a_stream_is_the_completion_in_parts(server):
    _, client, _ = server
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 22, "seed": 3, "temperature": 1}
    text = client.completions.create(**arguments).choices[0].text
    events = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for event in events for choice in event.choices) == text
    assert [c.finish_reason for event in events for c in event.choices][-1] == "length"
    assert len(events) >= 4
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 22


def test_several_prompts_and_copies(server, model, tokenizer):
    """Texts are in the order of `num_return_sequences`; prompts may also be token ids."""
    _, client, _ = server
    prompts = [PROMPT, "One day"]
    response = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=8, seed=5, temperature=1
    )
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    from_ids = client.completions.create(model="tiny", prompt=ids, n=2, max_tokens=8, seed=5, temperature=1)
    assert [c.text for c in response.choices] == [c.text for c in from_ids.choices]
    expected = []
    for prompt in prompts:
        expected += continue_texts(
            model, tokenizer, [prompt], num_return_sequences=2, max_new_tokens=8, seed=5, temperature=1
        )
    assert [choice.text for choice in response.choices] == expected
    assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
    events = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=8, seed=5, temperature=1, stream=True, echo=True
    )
    texts = dict.fromkeys(range(4), "")
    for event in events:
        for choice in event.choices:
            texts[choice.index] += choice.text
    echoes = [PROMPT, PROMPT, "One day", "One day"]
    assert list(texts.values()) == [a + b for a, b in zip(echoes, expected, strict=True)]


def test_chat_completion_follows_the_chat_template(server, model, tokenizer):
    _, client, _ = server
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    response = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, seed=2)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    text = client.completions.create(model="tiny", prompt=ids, max_tokens=12, seed=2).choices[0].text
    [choice] = response.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert response.object == "chat.completion"
    events = list(client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=12, seed=2, stream=True
    ))  # fmt: skip
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == text
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert (
        client.chat.completions.create(model="tiny", messages=parts, max_tokens=4).choices[0].message.content
    )


@pytest.mark.parametrize("stream", [False, True])
def test_text_ends_before_a_stop_string(server, stream):
    """Even if the stop string spans several chunks."""
    engine, client, _ = server
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "seed": 11, "temperature": 1}
    full_text = client.completions.create(**arguments).choices[0].text
    for start in range(3, 40, 4):
        stop = full_text[start : start + 5]
        response = client.completions.create(**arguments, stop=[stop, "never there"], stream=stream)
        if stream:
            events = list(response)
            text = "".join(event.choices[0].text for event in events)
            reason = events[-1].choices[0].finish_reason
        else:
            text, reason = response.choices[0].text, response.choices[0].finish_reason
        assert (text, reason) == (full_text[: full_text.index(stop)], "stop")
    wait_until(lambda: engine.num_rows == 0)


def test_chunks_are_returned_on_request(server):
    _, client, _ = server
    response = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=10,
        seed=1,
        temperature=0.5,
        extra_body={"return_chunks": True},
    )
    chunks = response.choices[0].model_extra["chunks"]
    assert [len(chunk["tokens"]) for chunk in chunks] == [4, 4, 2]
    assert all(chunk["num_draws"] >= 1 and 0 < chunk["agreement"] <= 1 for chunk in chunks)


INVALID = {
    "logprobs": ({"logprobs": 0}, "'logprobs' is not supported", "logprobs"),
    "bias": ({"logit_bias": {"5": 1}}, "'logit_bias' is not supported", "logit_bias"),
    "penalty": ({"presence_penalty": 0.5}, "'presence_penalty' is not supported", "presence_penalty"),
    "best_of": ({"best_of": 3}, "'best_of' is not supported", "best_of"),
    "unknown": ({"extra_body": {"color": 1}}, "there is no argument 'color'", "color"),
    "hot": ({"temperature": 1.5}, "must be between 0 and 1", "temperature"),
    "cold": ({"temperature": -1}, "greater than or equal to 0", "temperature"),
    "top_p": ({"top_p": 0}, "greater than 0", "top_p"),
    "no tokens": ({"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
    "many tokens": ({"max_tokens": 5000}, "must be at most 4096", "max_tokens"),
    "long": ({"max_tokens": 300}, "more than the context of 256", "prompt"),
    "draws": ({"extra_body": {"max_draws": 10**6}}, "must be at most 1000", "max_draws"),
    "sampler": (
        {"extra_body": {"sampler": "greedy"}},
        "sampler must be one of exact, pool, head; got 'greedy'",
        "sampler",
    ),
    "empty stop": ({"stop": ""}, "none of them empty", "stop"),
    "no prompt": ({"prompt": []}, "is empty", "prompt"),
    "ids": ({"prompt": [5, 100000]}, "token ids in 'prompt' must be between", "prompt"),
    "seed": ({"extra_body": {"seed": "x"}}, "valid integer", "seed"),
    "n": ({"n": 0}, "greater than or equal to 1", "n"),
}


@pytest.mark.parametrize(("arguments", "message", "param"), INVALID.values(), ids=INVALID)
def test_invalid_arguments_are_refused(arguments, message, param, server):
    _, client, _ = server
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, **arguments})
    assert raised.value.status_code == 400 and message in raised.value.body["message"]
    assert raised.value.type == "invalid_request_error" and raised.value.param == param


def test_explicit_defaults_are_accepted(server):
    _, client, _ = server
    client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, presence_penalty=0, frequency_penalty=0.0, logit_bias={},
        user="me", best_of=1,
    )  # fmt: skip
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=4, logprobs=False,
        response_format={"type": "text"}, metadata={"a": "b"}, store=False,
    )  # fmt: skip


def test_tools_and_unknown_models_are_refused(server):
    _, client, _ = server
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(openai.BadRequestError, match="this server has no tool calling"):
        tool = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model="tiny", messages=messages, tools=[tool])
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="gpt", prompt=PROMPT)


@pytest.mark.parametrize(
    "field",
    [
        {"prompt": "\ud800"},
        {"prompt": ["a", "b\ud800"]},
        {"stop": ["\udfff"]},
        {"user": "\ud800"},
        {"model": "\ud800"},
        {"\ud800": 1},
        {"stream": True, "prompt": "\ud800"},
    ],
)
def test_lone_surrogates_are_refused(field, server):
    _, _, url = server
    body = json.dumps({"model": "tiny", "prompt": PROMPT, **field}).encode()  # As an ASCII escape.
    response = httpx.post(f"{url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "a lone surrogate" in response.json()["error"]["message"]


def test_overlong_prompt_is_refused(server):
    _, client, _ = server
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt=[5] * 10_000, max_tokens=4)
    assert raised.value.code == "context_length_exceeded"


def test_health_and_metrics(server):
    _, client, url = server
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8)
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/nothing").status_code == 404
    text = httpx.get(f"{url}/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["calm_tokens_total"]) >= 8
    assert float(figures["calm_draws_total"]) >= float(figures["calm_chunks_total"]) >= 2
    assert float(figures['calm_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert not any("nothing" in line for line in figures), "unknown paths do not become labels"


def test_fifty_clients_get_what_each_would_get_alone(model, tokenizer):
    """Prompts of different lengths and settings join and leave a shared batch."""
    prompts = ["Once upon a time " + "there was a cat. " * (n % 5) for n in range(50)]
    temperatures = [1.0, 0.5, 0.7, 0.0]

    def complete(number):
        return client.completions.create(
            model="tiny", prompt=prompts[number], max_tokens=8 + number % 30, seed=number,
            temperature=temperatures[number % 4], extra_body={"max_draws": 16, "num_draws": 16},
        ).choices[0].text  # fmt: skip

    with serving(model, tokenizer, max_rows=8) as (engine, client, _):
        with ThreadPoolExecutor(50) as pool:
            texts = list(pool.map(complete, range(50)))
        statistics = engine.statistics
        assert statistics.chunks / statistics.steps > 3, "they shared steps"
    for number, text in enumerate(texts):
        assert text == generate_text(
            model, tokenizer, prompts[number], max_new_tokens=8 + number % 30, seed=number,
            temperature=temperatures[number % 4], max_draws=16, num_draws=16,
        )  # fmt: skip


def test_defaults_of_the_server_apply(model, tokenizer):
    with serving(model, tokenizer, temperature=0.0, draws=8) as (_, client, _):
        text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=1).choices[0].text
    assert text == generate_text(
        model, tokenizer, PROMPT, max_new_tokens=12, temperature=0, num_draws=8, seed=1
    )


def test_equal_prompts_of_a_request_get_different_texts(server, model, tokenizer):
    """They count as copies of one prompt."""
    _, client, _ = server
    arguments = {"model": "tiny", "max_tokens": 8, "seed": 5, "temperature": 1}
    response = client.completions.create(prompt=[PROMPT, "One day", PROMPT], **arguments)
    texts = [choice.text for choice in response.choices]
    copies = [choice.text for choice in client.completions.create(prompt=PROMPT, n=2, **arguments).choices]
    assert [texts[0], texts[2]] == copies and copies[0] != copies[1]


def test_head_that_takes_a_temperature_samples_by_default(tokenizer):
    model = tiny_model(4, vocab_size=320, head_config={"head_type": "categorical_flow"})
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "seed": 5}
    # The temperature of the request decides, not that of the server.
    with serving(model, tokenizer, temperature=0, draws=9) as (_, client, _):

        def draws(**more):
            extra = {"return_chunks": True, **more.pop("extra", {})}
            choice = client.completions.create(**arguments, **more, extra_body=extra).choices[0]
            return {chunk["num_draws"] for chunk in choice.chunks}, choice.text

        assert draws(temperature=0.5) == draws(temperature=0.5, extra={"sampler": "head"})
        assert draws(temperature=0.5)[0] == {1}
        assert draws(temperature=0)[0] == draws()[0] == {9}
        assert draws(temperature=0.5, top_p=0.9)[0] == {9}
        text = generate_text(model, tokenizer, PROMPT, max_new_tokens=8, temperature=0.5, seed=5)
        assert draws(temperature=0.5)[1] == text


def test_head_sampler_needs_a_head_that_takes_a_temperature(server):
    _, client, _ = server
    with pytest.raises(openai.BadRequestError, match="head does not take a temperature") as raised:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, extra_body={"sampler": "head"})
    assert raised.value.param == "sampler"
