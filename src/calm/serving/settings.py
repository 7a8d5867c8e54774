"""Settings and limits of a server."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings and limits of a server.

    Args:
        name: The model's name in requests.
        api_key: Key that requests must send; None for no key.
        temperature: Default temperature: the API's, whereas `calm serve` has that of the other commands.
        draws: Default number of draws per chunk; lowered to `max_draws` if that is less.
        max_rows: Texts generated at once.
        max_waiting: Texts that may wait in the queue; more are refused with 429.
        max_tokens: Maximum new tokens per text.
        max_request_tokens: Maximum total tokens of a request: prompts, thoughts and new tokens.
        max_draws: Maximum draws per chunk.
        max_thoughts: Maximum thoughts before a text (`calm.models.thoughts`).
        draws_at_once: Draws of all texts held in memory at once; beyond that, texts take turns.
        chunks_at_once: Prompt chunks prefilled between two generation steps.
        prefix_bytes: Memory of the prefix cache; 0 turns it off.
        max_body: Maximum bytes of a request.
        max_bytes: Maximum bytes of all unanswered requests; raised to `max_body` if it is lower.
        max_client_bytes: The same for one address.
        max_connections: Maximum connections; fewer if the system allows fewer open files.
        max_client_connections: Maximum connections from one address.
        header_seconds: Time limit for the headers of a request.
        body_seconds: Time limit for its body.
        write_seconds: How long a client may leave a response unread.
        template_seconds: Time limit for rendering the chat template.
        seconds: Time limit for a request.
        allowed_hosts: Host names that the server answers to, besides IP addresses, `localhost` and the
            machine's own name; "*" for any.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "draws", min(self.draws, self.max_draws))
