"""Connections: how many, how long each may take, and HTTP errors in the API's format.

uvicorn waits forever for headers, for bodies, and for clients that do not read their responses. Here
connections that are too slow are closed, if possible with an error, and file descriptors are reserved for the
rest of the process.
"""

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from calm.serving.errors import ApiError, quoted
from calm.serving.settings import ServerSettings

logger = logging.getLogger(__name__)
_SPARE = 100  # Reserved twice: for the listen backlog, and for connections that are refused with a reason.
_OTHER_FILES = 32
_SECONDS_TO_FINISH = 30  # For running texts when the server is asked to stop.
_SECONDS_TO_READ = 2.0  # For a client that is still sending to read why it is refused.


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections.

    Args:
        header_seconds: Time limit for the headers of a request.
        body_seconds: Time limit for its body.
        write_seconds: How long a client may leave a response unread.
        max_connections: Maximum connections.
        spare: Further connections that are told why they are closed.
        max_client_connections: Maximum connections from one address.
    """

    header_seconds: float
    body_seconds: float
    write_seconds: float
    max_connections: int
    spare: int
    max_client_connections: int


def uvicorn_config(app: FastAPI, settings: ServerSettings, **options: Any) -> uvicorn.Config:
    """The configuration of uvicorn for an application.

    Args:
        app: The application.
        settings: Settings and limits.
        **options: Further arguments of `uvicorn.Config`.
    """
    max_connections, spare = affordable_connections(settings.max_connections)
    limits = ConnectionLimits(
        header_seconds=settings.header_seconds,
        body_seconds=settings.body_seconds,
        write_seconds=settings.write_seconds,
        max_connections=max_connections,
        spare=spare,
        max_client_connections=settings.max_client_connections,
    )
    protocol = type("LimitedConnection", (Connection,), {"limits": limits})
    defaults = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": _SECONDS_TO_FINISH}
    return uvicorn.Config(app, **{**defaults, **options}, http=protocol, ws="none", backlog=spare)


def affordable_connections(requested: int) -> tuple[int, int]:
    """How many of the requested connections file descriptors allow, and how many more to accept and refuse.

    The limit on descriptors is raised if possible. The second number is also the length of the listen
    backlog, since all of it may be accepted before one connection can be refused.
    """
    try:
        import resource  # noqa: PLC0415 (not on Windows)
    except ImportError:
        return requested, _SPARE
    needed = _open_files() + _OTHER_FILES + requested + 2 * _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (ValueError, OSError):
            logger.debug("the file descriptor limit cannot be raised")
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return requested, _SPARE
    free = requested + 2 * _SPARE - (needed - soft)
    affordable = max(1, free // 2, free - 2 * _SPARE)
    spare = max(1, (free - affordable) // 2)
    logger.warning(
        "the limit is %d open files, so at most %d connections are accepted; raise 'ulimit -n' for %d.",
        soft,
        affordable,
        requested,
    )
    return affordable, spare


def _open_files() -> int:
    try:
        return len(list(Path("/dev/fd").iterdir()))
    except OSError:
        return _OTHER_FILES


class Connection(H11Protocol):
    """A connection with time limits."""

    limits: ConnectionLimits
    _timer: asyncio.TimerHandle | None = None  # For what is being read.
    _phase: str | None = None  # What that is: "head" or "body" of a request, or the "rest" of a refused one.
    _write_timer: asyncio.TimerHandle | None = None
    _is_refused = False
    _has_received = False  # Whether any part of the current request has arrived.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or refuse it with the reason."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # Pause as soon as the system's buffers are full.
        if len(self.connections) > self.limits.max_connections + self.limits.spare:
            transport.abort()
        elif len(self.connections) > self.limits.max_connections:
            self._refuse(_too_many("all clients", self.limits.max_connections))
        elif self._num_client_connections() > self.limits.max_client_connections:
            self._refuse(_too_many("one client", self.limits.max_client_connections))
        else:
            self._start_timer("head", self.limits.header_seconds, self._on_head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._stop_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive a part of a request."""
        if self._is_refused:
            return
        self._has_received = True
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        """Get ready for the next request."""
        self._has_received = False
        super().on_response_complete()
        self._update_timer(is_idle=True)

    def _update_timer(self, is_idle: bool = False) -> None:
        """Start the timer for what is being read, or stop it."""
        state = self.conn.their_state
        if self._is_refused or self.transport.is_closing():
            return
        if state is h11.SEND_BODY:
            self._start_timer("body", self.limits.body_seconds, self._on_body_timeout)
        elif state is h11.IDLE and not is_idle:  # uvicorn closes connections that are idle between requests.
            self._start_timer("head", self.limits.header_seconds, self._on_head_timeout)
        else:
            self._stop_timer()

    def _start_timer(self, phase: str, seconds: float, on_timeout: Callable[[], None]) -> None:
        """Start the timer of a phase, unless it is running, and stop that of any other."""
        if phase != self._phase:
            self._stop_timer()
            self._phase, self._timer = phase, self.loop.call_later(seconds, on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._phase = self._timer = None

    def _on_head_timeout(self) -> None:
        if self._has_received:
            self._refuse(_too_slow("head", self.limits.header_seconds))
        else:
            self.transport.close()

    def _on_body_timeout(self) -> None:
        if self.cycle is None or self.cycle.response_started:
            self.transport.abort()
            return
        self._refuse(_too_slow("body", self.limits.body_seconds))
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def pause_writing(self) -> None:
        """The client reads more slowly than we send: start the write timer."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_seconds, self._reset)

    def resume_writing(self) -> None:
        """The client has caught up: stop the write timer."""
        super().resume_writing()
        self._stop_write_timer()

    def _reset(self) -> None:
        """Reset the connection. A normal close would wait behind the data that the client does not read."""
        with contextlib.suppress(OSError):
            no_lingering = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, no_lingering
            )
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Respond to invalid HTTP; uvicorn calls this while it handles the error."""
        self._refuse(self._http_error(sys.exc_info()[1]))

    def _http_error(self, error: BaseException | None) -> ApiError:
        status = getattr(error, "error_status_hint", 400)
        if status == 431 and b"\n" not in self.conn.trailing_data[0]:
            return ApiError("the URL is too long; shorten it.", 414)
        if status == 431:
            return ApiError("the headers are too long; send fewer or shorter ones.", 431)
        return ApiError(f"not a valid HTTP/1.1 request ({quoted(str(error))}).", status)

    def _refuse(self, error: ApiError) -> None:
        """Send an error and close, after a while in which the client may still be sending."""
        self._is_refused = True
        self._stop_timer()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # In the middle of a response.
            self.transport.abort()
            return
        response = error.response()
        headers = [
            *response.raw_headers,
            (b"connection", b"close"),
            (b"x-request-id", f"req_{secrets.token_hex(12)}".encode()),
        ]
        try:
            head = self.conn.send(h11.Response(status_code=error.status, headers=headers)) or b""
            is_head = self.scope is not None and self.scope["method"] == "HEAD"
            body = b"" if is_head else self.conn.send(h11.Data(data=bytes(response.body))) or b""
        except h11.LocalProtocolError:
            self.transport.abort()
            return
        self.transport.write(head + body)
        self._start_timer("rest", _SECONDS_TO_READ, self.transport.abort)
        try:
            self.transport.write_eof()
        except OSError:  # The client has left.
            self.transport.abort()

    def _num_client_connections(self) -> int:
        address = _address(self)
        return sum(_address(other) == address for other in self.connections)

    def shutdown(self) -> None:
        """Close the connection when the server stops."""
        if self._is_refused:
            self.transport.abort()
        else:
            super().shutdown()


def _address(connection: Any) -> str:
    """The client: its IPv4 address, or its IPv6 /64 network, since all of that has one owner."""
    host = connection.client[0] if connection.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    return str(address) if address.version == 4 else address.exploded[:19]


def _too_slow(part: str, seconds: float) -> ApiError:
    message = f"the {part} of the request took longer than {seconds:g} seconds."
    return ApiError(message, 408, code="request_timeout")


def _too_many(clients: str, limit: int) -> ApiError:
    return ApiError(
        f"the limit of {limit} connections from {clients} is reached; try again later.",
        503,
        "server_error",
        code="too_many_connections",
    )
