"""Load and failures: clients that behave badly, a server that is full, slow, broken or asked to end."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving_client import PROMPT, alone, serving, slowed, wait_until

from calm.models.generation.batching import ChunkBatch


def test_a_full_queue(model, tokenizer, monkeypatch):
    slowed(monkeypatch, 0.05)
    with serving(model, tokenizer, max_rows=1, max_waiting=2) as (engine, client, _):

        def ask(number):
            try:
                return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, seed=number)
            except openai.RateLimitError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        refused = [answer for answer in answers if isinstance(answer, Exception)]
        assert 1 <= len(refused) <= 6
        assert all(error.status_code == 429 and error.code == "queue_full" for error in refused)
        streams = []
        for waiting in range(3):  # Behind the one that is being written.
            streams.append(
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, stream=True)
            )
            wait_until(lambda: (engine.num_rows, engine.num_waiting) == (1, waiting))
        with pytest.raises(openai.RateLimitError):  # All or none.
            client.completions.create(model="tiny", prompt=[PROMPT] * 2)
        for stream in streams:
            stream.close()  # Those that wait make room at once.
        wait_until(lambda: engine.num_waiting == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream, model, tokenizer, monkeypatch):
    slowed(monkeypatch, 0.05)
    with serving(model, tokenizer) as (engine, client, url):
        body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "stream": stream}).encode()
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: engine.num_rows == 1)
            connection.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: engine.num_rows == 0, seconds=2)
        assert engine.statistics.tokens < 200
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text


def test_a_slow_reader_does_not_hold_the_others_up(model, tokenizer):
    with serving(model, tokenizer) as (engine, client, _):
        reader = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, stream=True, seed=1)
        first = next(iter(reader))
        text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, seed=2).choices[0].text
        assert text == alone(model, tokenizer, PROMPT, max_new_tokens=200, seed=2, temperature=1.0)
        rest = "".join(event.choices[0].text for event in reader)
        expected = alone(model, tokenizer, PROMPT, max_new_tokens=200, seed=1, temperature=1.0)
        assert first.choices[0].text + rest == expected
        wait_until(lambda: engine.num_rows == 0)


def test_a_text_that_takes_too_long(model, tokenizer, monkeypatch):
    slowed(monkeypatch, 0.1)
    with serving(model, tokenizer, seconds=0.35) as (engine, client, _):
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200)
        assert raised.value.status_code == 504 and raised.value.code == "timeout"
        with pytest.raises(openai.APIError, match="took too long"):
            list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, stream=True))
        wait_until(lambda: engine.num_rows == 0)


def test_an_error_ends_its_texts_and_not_the_server(model, tokenizer, monkeypatch):
    from calm.models.generation.batching import ChunkBatch

    with serving(model, tokenizer) as (_, client, _):
        with monkeypatch.context() as patch:

            def broken(self):
                raise ValueError("the head drew a latent that is not finite")

            patch.setattr(ChunkBatch, "step", broken)
            with pytest.raises(openai.InternalServerError, match="not finite"):
                client.completions.create(model="tiny", prompt=PROMPT)
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4).choices[0].text


def test_an_error_of_one_text_is_told_to_who_asked_for_it_alone(model, tokenizer, monkeypatch):
    join, write, bad, at_fault = ChunkBatch.join, ChunkBatch._write, "A bad one", []

    def known(self, prompt, *others):
        row = join(self, prompt, *others)
        if prompt == tokenizer(bad)["input_ids"]:
            at_fault.append(row)
        return row

    def poisoned(self):
        for place, row in enumerate(self._rows):
            if row in at_fault:
                self._open.hidden_RD[place] = float("nan")
        return write(self)

    monkeypatch.setattr(ChunkBatch, "join", known)
    monkeypatch.setattr(ChunkBatch, "_write", poisoned)
    with serving(model, tokenizer) as (engine, client, _), ThreadPoolExecutor(6) as pool:

        def ask(number):
            prompt = bad if number == 3 else PROMPT
            try:
                answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=40, seed=number)
            except openai.InternalServerError as error:
                return error
            return answer.choices[0].text

        texts = list(pool.map(ask, range(6)))
        assert "not finite" in str(texts.pop(3))
        expected = [
            alone(model, tokenizer, PROMPT, max_new_tokens=40, seed=number, temperature=1.0)
            for number in (0, 1, 2, 4, 5)
        ]
        assert texts == expected and engine.num_rows == 0


def test_stopping_ends_what_is_being_written(model, tokenizer, monkeypatch):
    slowed(monkeypatch, 0.2)
    ends = []
    with serving(model, tokenizer) as (engine, client, _):

        def ask():
            try:
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200)
            except openai.APIError as error:
                ends.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: engine.num_rows == 1)
    thread.join(20)
    assert not thread.is_alive() and len(ends) == 1 and not engine.is_alive


def test_an_engine_that_breaks_tells_everybody(model, tokenizer, monkeypatch):
    """Also those who come later."""

    def broken(self, *arguments):
        raise SystemError("the device is gone")

    with serving(model, tokenizer) as (engine, client, _):
        monkeypatch.setattr(ChunkBatch, "step", broken)
        monkeypatch.setattr(ChunkBatch, "__init__", broken)
        for message in ("device is gone", "shutting down"):
            with pytest.raises(openai.APIStatusError, match=message):
                client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4)
            wait_until(lambda: not engine.is_alive)
