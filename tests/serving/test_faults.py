"""Load and failures: misbehaving clients, a server that is full, slow, broken or shutting down."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving_client import PROMPT, connect, generate_text, serving, slow_down_steps, wait_until

from calm.models.generation.batching import ChunkBatch


def test_full_queue_refuses_requests(model, tokenizer, monkeypatch):
    slow_down_steps(monkeypatch, 0.05)
    with serving(model, tokenizer, max_rows=1, max_waiting=2) as (engine, client, _):

        def ask(number):
            try:
                return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, seed=number)
            except openai.RateLimitError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(ask, range(8)))
        refused = [response for response in responses if isinstance(response, Exception)]
        assert 1 <= len(refused) <= 6
        assert all(error.status_code == 429 and error.code == "queue_full" for error in refused)
        streams = []
        for waiting in range(3):  # The first text is generated, the others wait.
            streams.append(
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, stream=True)
            )
            wait_until(lambda: (engine.num_rows, engine.num_waiting) == (1, waiting))
        with pytest.raises(openai.RateLimitError):  # Queued together or not at all.
            client.completions.create(model="tiny", prompt=[PROMPT] * 2)
        for stream in streams:
            stream.close()  # Waiting texts make room at once.
        wait_until(lambda: engine.num_waiting == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_ends_the_generation(stream, model, tokenizer, monkeypatch):
    slow_down_steps(monkeypatch, 0.05)
    with serving(model, tokenizer) as (engine, client, url):
        body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "stream": stream}).encode()
        with connect(url) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: engine.num_rows == 1)
            connection.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: engine.num_rows == 0, seconds=2)
        assert engine.statistics.tokens < 200
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text


def test_slow_reader_does_not_delay_others(model, tokenizer):
    with serving(model, tokenizer) as (engine, client, _):
        reader = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, stream=True, seed=1)
        first = next(iter(reader))
        text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, seed=2).choices[0].text
        assert text == generate_text(model, tokenizer, PROMPT, max_new_tokens=200, seed=2, temperature=1.0)
        remaining = "".join(event.choices[0].text for event in reader)
        expected = generate_text(model, tokenizer, PROMPT, max_new_tokens=200, seed=1, temperature=1.0)
        assert first.choices[0].text + remaining == expected
        wait_until(lambda: engine.num_rows == 0)


def test_text_past_its_time_limit_is_given_up(model, tokenizer, monkeypatch):
    slow_down_steps(monkeypatch, 0.1)
    with serving(model, tokenizer, seconds=0.35) as (engine, client, _):
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200)
        assert raised.value.status_code == 504 and raised.value.code == "timeout"
        with pytest.raises(openai.APIError, match="took too long"):
            list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, stream=True))
        wait_until(lambda: engine.num_rows == 0)


def test_failed_step_ends_its_texts_but_not_the_server(model, tokenizer, monkeypatch):
    with serving(model, tokenizer) as (_, client, _):
        with monkeypatch.context() as patch:

            def failing_step(self):
                raise ValueError("the head drew a latent that is not finite")

            patch.setattr(ChunkBatch, "step", failing_step)
            with pytest.raises(openai.InternalServerError, match="not finite"):
                client.completions.create(model="tiny", prompt=PROMPT)
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text


def test_error_of_one_text_reaches_only_its_client(model, tokenizer, monkeypatch):
    join, write, bad_prompt, bad_rows = ChunkBatch.join, ChunkBatch._write, "A bad one", []

    def join_and_mark(self, prompt, *others):
        row = join(self, prompt, *others)
        if prompt == tokenizer(bad_prompt)["input_ids"]:
            bad_rows.append(row)
        return row

    def write_with_nan(self):
        for index, row in enumerate(self._rows):
            if row in bad_rows:
                self._open.hidden_RD[index] = float("nan")
        return write(self)

    monkeypatch.setattr(ChunkBatch, "join", join_and_mark)
    monkeypatch.setattr(ChunkBatch, "_write", write_with_nan)
    with serving(model, tokenizer) as (engine, client, _), ThreadPoolExecutor(6) as pool:

        def ask(number):
            prompt = bad_prompt if number == 3 else PROMPT
            try:
                response = client.completions.create(model="tiny", prompt=prompt, max_tokens=40, seed=number)
            except openai.InternalServerError as error:
                return error
            return response.choices[0].text

        texts = list(pool.map(ask, range(6)))
        assert "not finite" in str(texts.pop(3))
        expected = [
            generate_text(model, tokenizer, PROMPT, max_new_tokens=40, seed=number, temperature=1.0)
            for number in (0, 1, 2, 4, 5)
        ]
        assert texts == expected and engine.num_rows == 0


def test_shutdown_ends_texts_that_are_being_generated(model, tokenizer, monkeypatch):
    slow_down_steps(monkeypatch, 0.2)
    errors = []
    with serving(model, tokenizer) as (engine, client, _):

        def ask():
            try:
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200)
            except openai.APIError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: engine.num_rows == 1)
    thread.join(20)
    assert not thread.is_alive() and len(errors) == 1 and not engine.is_alive


def test_broken_engine_is_reported_to_every_client(model, tokenizer, monkeypatch):
    """Later requests get an error as well."""

    def broken(self, *arguments):
        raise SystemError("the device is gone")

    with serving(model, tokenizer) as (engine, client, _):
        monkeypatch.setattr(ChunkBatch, "step", broken)
        monkeypatch.setattr(ChunkBatch, "__init__", broken)
        for message in ("device is gone", "shutting down"):
            with pytest.raises(openai.APIStatusError, match=message):
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4)
            wait_until(lambda: not engine.is_alive)
