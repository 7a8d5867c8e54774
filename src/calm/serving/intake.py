"""Limits on the bytes of requests in flight, of all clients together and of each one."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive, Scope

from calm.serving.errors import ApiError


class Intake:
    """Counts the bytes of each body, from when they arrive to the end of the response.

    Args:
        most: Maximum bytes of all requests together.
        most_of_client: Maximum bytes of the requests from one address.
    """

    def __init__(self, most: int, most_of_client: int) -> None:
        self._most, self._most_of_client = most, most_of_client
        self._of_clients: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """Bytes of all unanswered requests."""
        return self._of_clients.total()

    @contextmanager
    def counted(self, scope: Scope, receive: Receive) -> Iterator[Receive]:
        """Count the bytes that a request receives.

        Args:
            scope: ASGI scope of the request.
            receive: Returns its messages.

        Yields:
            A `receive` that counts them, and raises ApiError above a limit.
        """
        client, taken = (scope.get("client") or ("",))[0], 0

        async def count() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            for whose, kept, most in (
                ("from this client", self._of_clients[client], self._most_of_client),
                ("from all clients", self.num_bytes, self._most),
            ):
                if size and kept + size > most:
                    raise ApiError(
                        f"unanswered requests {whose} total {kept} bytes, and at most "
                        f"{most} are allowed; try again later.",
                        429,
                        "rate_limit_error",
                        code="too_many_bytes",
                    )
            taken += size
            self._of_clients[client] += size
            return message

        try:
            yield count
        finally:
            self._of_clients[client] -= taken
            if not self._of_clients[client]:
                del self._of_clients[client]
