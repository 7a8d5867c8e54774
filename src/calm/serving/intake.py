"""Limits on the bytes of requests in flight, of all clients together and of each client."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive, Scope

from calm.serving.errors import ApiError


class Intake:
    """Counts the bytes of each body, from when they arrive to the end of the response.

    Args:
        max_bytes: Maximum bytes of all requests together.
        max_client_bytes: Maximum bytes of the requests from one address.
    """

    def __init__(self, max_bytes: int, max_client_bytes: int) -> None:
        self._max_bytes, self._max_client_bytes = max_bytes, max_client_bytes
        self._bytes_by_client: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """Bytes of all unanswered requests."""
        return self._bytes_by_client.total()

    @contextmanager
    def counted(self, scope: Scope, receive: Receive) -> Iterator[Receive]:
        """Count the bytes that a request receives.

        Args:
            scope: ASGI scope of the request.
            receive: Returns its messages.

        Yields:
            A `receive` that counts them, and raises ApiError above a limit.
        """
        client, received = (scope.get("client") or ("",))[0], 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            for source, total, limit in (
                ("from this client", self._bytes_by_client[client], self._max_client_bytes),
                ("from all clients", self.num_bytes, self._max_bytes),
            ):
                if size and total + size > limit:
                    raise ApiError(
                        f"unanswered requests {source} total {total} bytes, and at most "
                        f"{limit} are allowed; try again later.",
                        429,
                        "rate_limit_error",
                        code="too_many_bytes",
                    )
            received += size
            self._bytes_by_client[client] += size
            return message

        try:
            yield count
        finally:
            self._bytes_by_client[client] -= received
            if not self._bytes_by_client[client]:
                del self._bytes_by_client[client]
