"""Middleware for every request: Host and key checks, an id, metrics, and a response to uncaught errors."""

import contextlib
import logging
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calm.serving.errors import ApiError, internal_error
from calm.serving.hosts import Hosts
from calm.serving.intake import Intake
from calm.serving.metrics import Metrics
from calm.serving.playground import PAGE_PATHS

logger = logging.getLogger(__name__)
# Answered without a key.
_OPEN_PATHS = ("/health", *PAGE_PATHS)


class Watch:
    """Checks host and key, gives each request an id, and counts it once its response has ended.

    Args:
        app: The application.
        key: API key that requests must send; None for no key.
        hosts: Host names that the server answers to.
        intake: Counts the bytes of bodies.
        metrics: Counts requests.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: Hosts, intake: Intake, metrics: Metrics) -> None:
        self._app, self._hosts, self._intake, self._metrics = app, hosts, intake, metrics
        # The environment may hold bytes that are not UTF-8; Python keeps them as surrogates.
        self._keys = None if key is None else _encodings(key.strip())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # For a client that leaves before any response.
        request_id, is_answered = f"req_{secrets.token_hex(12)}", False
        scope = {**_normalized(scope), "request_id": request_id}

        async def send_and_record(message: Message) -> None:
            nonlocal status, is_answered
            if message["type"] == "http.response.start":
                status, is_answered = message["status"], True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            try:
                self._hosts.check(Headers(scope=scope).get("host"))
                self._check_key(scope)
            except ApiError as error:
                await error.response()(scope, receive, send_and_record)
            else:
                with self._intake.counted(scope, receive) as counted:
                    await self._app(scope, counted, send_and_record)
        except Exception:
            logger.exception("request %s failed", request_id)
            if is_answered:
                status = 500
                raise
            await internal_error(request_id).response()(scope, receive, send_and_record)
        finally:
            # The route, never the requested path, since the number of labels must stay small.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def _check_key(self, scope: Scope) -> None:
        if self._keys is None or scope["path"] in _OPEN_PATHS:
            return
        scheme, _, credentials = Headers(scope=scope).get("authorization", "").partition(" ")
        # Headers are decoded as Latin-1, so encoding restores the bytes. Only ASCII white space is stripped:
        # other white space may be part of a UTF-8 character.
        sent = credentials.strip(" \t").encode("latin-1")
        matches = [secrets.compare_digest(sent, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                401,
                kind="authentication_error",
                code="invalid_api_key",
            )


def _encodings(key: str) -> set[bytes]:
    """The bytes that clients may send for a key: UTF-8, and Latin-1 if it can encode the key."""
    encodings = {key.encode("utf-8", "surrogateescape")}
    with contextlib.suppress(UnicodeEncodeError):
        encodings.add(key.encode("latin-1"))
    return encodings


def _normalized(scope: Scope) -> Scope:
    """Treat HEAD as GET, since the server omits the body, and drop a trailing '/' from the path."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    path = scope["path"]
    return {**scope, "method": method, "path": path[:-1] if len(path) > 2 and path.endswith("/") else path}
