"""Bytes of requests in flight: what is kept of all bodies has a ceiling, and so has that of each client."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive, Scope

from calm.serving.errors import ApiError


class Intake:
    """Counts bodies from their first byte to the end of the answer.

    Args:
        most: Bytes of all requests together.
        most_of_client: Bytes of the requests of one address.
    """

    def __init__(self, most: int, most_of_client: int) -> None:
        self._most, self._most_of_client = most, most_of_client
        self._of_clients: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """Bytes of the requests that are not answered yet."""
        return self._of_clients.total()

    @contextmanager
    def counted(self, scope: Scope, receive: Receive) -> Iterator[Receive]:
        """Count what a request receives.

        Args:
            scope: The request's.
            receive: Gives its messages.

        Yields:
            Gives them too, or raises ApiError where they are too much.
        """
        client, taken = (scope.get("client") or ("",))[0], 0

        async def count() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            for whose, kept, most in (
                ("of this client", self._of_clients[client], self._most_of_client),
                ("of all clients", self.num_bytes, self._most),
            ):
                if size and kept + size > most:
                    raise ApiError(
                        f"the requests {whose} that are not answered yet have {kept} bytes, and at most "
                        f"{most} are allowed; try later.",
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
