"""Connections: how many, how long each may take, and errors of HTTP in the form of the API.

uvicorn waits for heads and bodies for ever, and for clients that do not take their answers. Here a connection
that waits too long is told so and closed, and descriptors are left for the rest of the process.
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
_SPARE = 100  # Connections that may be accepted at once before any is refused; and again, that are told why.
_OTHER_FILES = 32
_SECONDS_TO_FINISH = 30  # What is being written when the server is asked to end may end first.
_SECONDS_TO_READ = 2.0  # For a client that still sends, to see why it is refused.


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may take.

    Args:
        header_seconds: For the head of a request.
        body_seconds: For its body.
        write_seconds: For a client to take what has been sent.
        most: Connections at the same time.
        spare: Connections beyond those that are told why they are closed.
        most_of_client: Connections of one address at the same time.
    """

    header_seconds: float
    body_seconds: float
    write_seconds: float
    most: int
    spare: int
    most_of_client: int


def uvicorn_config(app: FastAPI, settings: ServerSettings, **options: Any) -> uvicorn.Config:
    """How uvicorn serves the application.

    Args:
        app: The application.
        settings: What is allowed.
        **options: Further arguments of `uvicorn.Config`.
    """
    most, spare = affordable_connections(settings.max_connections)
    limits = ConnectionLimits(
        settings.header_seconds,
        settings.body_seconds,
        settings.write_seconds,
        most,
        spare,
        settings.max_client_connections,
    )
    protocol = type("LimitedConnection", (Connection,), {"limits": limits})
    fixed = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": _SECONDS_TO_FINISH}
    return uvicorn.Config(app, **{**fixed, **options}, http=protocol, ws="none", backlog=spare)


def affordable_connections(wanted: int) -> tuple[int, int]:
    """As many connections as descriptors allow, whose limit is raised if it can be, and a few to spare.

    The system's queue of connections is as long, since all in it may be accepted before one can be refused.
    """
    try:
        import resource  # noqa: PLC0415 (not on Windows)
    except ImportError:
        return wanted, _SPARE
    needed = _open_files() + _OTHER_FILES + wanted + 2 * _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        except (ValueError, OSError):
            logger.debug("the limit of descriptors cannot be raised")
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted, _SPARE
    free = wanted + 2 * _SPARE - (needed - soft)
    affordable = max(1, free // 2, free - 2 * _SPARE)
    spare = max(1, (free - affordable) // 2)
    logger.warning(
        "%d open files are allowed, so at most %d connections are taken; raise 'ulimit -n' for %d.",
        soft,
        affordable,
        wanted,
    )
    return affordable, spare


def _open_files() -> int:
    try:
        return len(list(Path("/dev/fd").iterdir()))
    except OSError:
        return _OTHER_FILES


class Connection(H11Protocol):
    """A connection that has no time to lose."""

    limits: ConnectionLimits
    _clock: asyncio.TimerHandle | None = None  # Of the request that is being read.
    _clock_of: str | None = None
    _write_clock: asyncio.TimerHandle | None = None
    _is_refused = _has_begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, or say why not."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # What the system does not take waits in the answer.
        if len(self.connections) > self.limits.most + self.limits.spare:
            transport.abort()
        elif len(self.connections) > self.limits.most:
            self._refuse(_too_many("all clients", self.limits.most))
        elif self._number_of_client() > self.limits.most_of_client:
            self._refuse(_too_many("one client", self.limits.most_of_client))
        else:
            self._time("head", self.limits.header_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._time(None)
        self._stop_write_clock()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        if self._is_refused:
            return
        self._has_begun = True
        super().data_received(data)
        self._look_at_request()

    def on_response_complete(self) -> None:
        """The next request may begin."""
        self._has_begun = False
        super().on_response_complete()
        self._look_at_request(is_idle=True)

    def _look_at_request(self, is_idle: bool = False) -> None:
        """Give what is being read its time."""
        state = self.conn.their_state
        if self._is_refused or self.transport.is_closing():
            return
        if state is h11.SEND_BODY:
            self._time("body", self.limits.body_seconds, self._body_is_late)
        elif state is h11.IDLE and not is_idle:  # uvicorn closes connections that are idle between requests.
            self._time("head", self.limits.header_seconds, self._head_is_late)
        else:
            self._time(None)

    def _time(self, what: str | None, seconds: float = 0, late: Callable[[], None] | None = None) -> None:
        """Begin to wait for something, unless that has begun."""
        if what == self._clock_of:
            return
        if self._clock is not None:
            self._clock.cancel()
        self._clock = None if late is None else self.loop.call_later(seconds, late)
        self._clock_of = what

    def _head_is_late(self) -> None:
        if self._has_begun:
            self._refuse(_too_slow("head", self.limits.header_seconds))
        else:
            self.transport.close()

    def _body_is_late(self) -> None:
        if self.cycle is None or self.cycle.response_started:
            self.transport.abort()
            return
        self._refuse(_too_slow("body", self.limits.body_seconds))
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        if self._write_clock is None:
            self._write_clock = self.loop.call_later(self.limits.write_seconds, self._reset)

    def resume_writing(self) -> None:
        """The client has taken all."""
        super().resume_writing()
        self._stop_write_clock()

    def _reset(self) -> None:
        """Hang up at once. A mere end would wait in the system behind what the client does not take."""
        with contextlib.suppress(OSError):
            no_lingering = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, no_lingering
            )
        self.transport.abort()

    def _stop_write_clock(self) -> None:
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; uvicorn calls this while it handles the error."""
        self._refuse(self._why_no_http(sys.exc_info()[1]))

    def _why_no_http(self, error: BaseException | None) -> ApiError:
        status = getattr(error, "error_status_hint", 400)
        if status == 431 and b"\n" not in self.conn.trailing_data[0]:
            return ApiError("the URL is too long; shorten it.", 414)
        if status == 431:
            return ApiError("the headers are too long; send fewer or shorter ones.", 431)
        return ApiError(f"this is no HTTP/1.1 that can be read ({quoted(str(error))}).", status)

    def _refuse(self, error: ApiError) -> None:
        """Send an error and hang up, after a while in which the client may still be sending."""
        self._is_refused = True
        self._time(None)
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # In the middle of an answer.
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
        self._time("rest", _SECONDS_TO_READ, self.transport.abort)
        try:
            self.transport.write_eof()
        except OSError:  # The client has left.
            self.transport.abort()

    def _number_of_client(self) -> int:
        own = _address(self)
        return sum(_address(other) == own for other in self.connections)

    def shutdown(self) -> None:
        """The server ends."""
        if self._is_refused:
            self.transport.abort()
        else:
            super().shutdown()


def _address(connection: Any) -> str:
    """Who is at the other end: an address, or the network of an IPv6 one, whose owner has all of it."""
    host = connection.client[0] if connection.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    return str(address) if address.version == 4 else address.exploded[:19]


def _too_slow(what: str, seconds: float) -> ApiError:
    message = f"the {what} of the request took longer than {seconds:g} seconds."
    return ApiError(message, 408, code="request_timeout")


def _too_many(whose: str, most: int) -> ApiError:
    return ApiError(
        f"there are {most} connections of {whose}, and no more are taken; try later.",
        503,
        "server_error",
        code="too_many_connections",
    )
