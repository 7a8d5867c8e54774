"""A model served for real on loopback, and the client that people have."""

import threading
import time
from contextlib import contextmanager

import openai
import uvicorn

from calm.models.generation.batching import ChunkBatch
from calm.serving.app import create_app
from calm.serving.connections import uvicorn_config
from calm.serving.settings import ServerSettings
from calm.texts import continue_texts


@contextmanager
def serving(model, tokenizer, **settings):
    """A running server and a client of it."""
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
        yield app.state.engine, client, url
    finally:
        server.should_exit = True
        thread.join()


PROMPT = "Once upon a time"


def alone(model, tokenizer, prompt, **settings):
    [text] = continue_texts(model, tokenizer, [prompt], **settings)
    return text


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def slowed(monkeypatch, seconds):
    """Steps take at least so long."""
    step = ChunkBatch.step

    def slow(self):
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(ChunkBatch, "step", slow)
