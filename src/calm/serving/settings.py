"""What a server allows."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server allows.

    Args:
        name: The model's name in requests.
        api_key: What requests must show; None for no key.
        temperature: Of requests that say none.
        draws: Draws of a chunk for requests that say none.
        max_rows: Texts that are written at the same time.
        max_waiting: Texts that wait; more are refused with 429.
        max_tokens: Most new tokens of a text.
        max_request_tokens: Most tokens of all texts of a request together: prompts, thoughts, new ones.
        max_draws: Most draws of a chunk.
        max_thoughts: Most thoughts before a text (`calm.models.thoughts`).
        draws_at_once: Draws of all texts together that are held in memory; with more, texts take turns.
        chunks_at_once: Chunks of prompts that are read between two steps of the texts.
        prefix_bytes: Memory for beginnings of prompts that may come again; 0 keeps none.
        max_body: Bytes of a request.
        max_bytes: Bytes of all requests that are not answered yet, at least those of one.
        max_client_bytes: The same for one address.
        max_connections: Connections at the same time; fewer where the system does not allow as many files.
        max_client_connections: Connections of one address at the same time.
        header_seconds: How long the head of a request may take.
        body_seconds: How long its body may take.
        write_seconds: How long a client may leave what has been sent to it.
        template_seconds: How long the chat template may take.
        seconds: How long a request may take.
        allowed_hosts: Names that it may be called by, beside addresses, `localhost` and the machine's own;
            "*" for any.
    """

    name: str
    api_key: str | None = None
    temperature: float = 1.0
    draws: int = 200
    max_rows: int = 16
    max_waiting: int = 256
    max_tokens: int = 4096
    max_request_tokens: int = 1 << 18
    max_draws: int = 1000
    max_thoughts: int = 64
    draws_at_once: int = 4096
    chunks_at_once: int = 128
    prefix_bytes: int = 1 << 28
    max_body: int = 1 << 20
    max_bytes: int = 1 << 26
    max_client_bytes: int = 1 << 24
    max_connections: int = 512
    max_client_connections: int = 128
    header_seconds: float = 20.0
    body_seconds: float = 60.0
    write_seconds: float = 60.0
    template_seconds: float = 5.0
    seconds: float = 300.0
    allowed_hosts: Sequence[str] = ()
