"""A model behind a real server on loopback, and the client that people have."""

import threading
import time
from contextlib import contextmanager

import openai
import uvicorn

from calm.serving.app import ServerSettings, create_app


@contextmanager
def serving(model, tokenizer, **settings):
    """A running server and a client of it."""
    app = create_app(model, tokenizer, ServerSettings(**{"name": "tiny", **settings}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
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
