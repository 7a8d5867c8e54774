"""A model served on loopback, an OpenAI client of it, and what tests of the server share."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

import openai
import uvicorn

from calm.models.generation.batching import ChunkBatch
from calm.serving.app import create_app
from calm.serving.connections import uvicorn_config
from calm.serving.engine import Engine
from calm.serving.settings import ServerSettings
from calm.texts import continue_texts

PROMPT = "Once upon a time"


class RunningServer(NamedTuple):
    engine: Engine
    client: openai.OpenAI
    url: str


@contextmanager
def serving(model, tokenizer, **settings) -> Iterator[RunningServer]:
    """Serve a model for the block, at a free port."""
    settings = ServerSettings(**{"name": "tiny", **settings})
    app = create_app(model, tokenizer, settings)
    server = uvicorn.Server(uvicorn_config(app, settings, port=0, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)
        yield RunningServer(app.state.engine, client, url)
    finally:
        server.should_exit = True
        thread.join()


def address_of(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rsplit(":", 1)[1])


def connect(url: str, timeout: float = 10) -> socket.socket:
    """A connection for bytes that no HTTP client would send."""
    return socket.create_connection(address_of(url), timeout=timeout)


def generate_text(model, tokenizer, prompt: str, **settings) -> str:
    """The text of a prompt without a server and without other texts in the batch."""
    [text] = continue_texts(model, tokenizer, [prompt], **settings)
    return text


def is_api_error(response) -> bool:
    """Whether the body of a response is an error in the format of the OpenAI API."""
    return set(response.json()["error"]) == {"message", "type", "param", "code"}


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.01)


def slow_down_steps(monkeypatch, seconds: float) -> None:
    """Make every generation step take at least so long."""
    step = ChunkBatch.step

    def slow_step(self):
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(ChunkBatch, "step", slow_step)


def must_not_run(*_) -> NoReturn:
    """Stands in for work that may not begin."""
    raise AssertionError("this must be refused before any work")
