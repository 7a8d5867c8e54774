"""The host names that a server answers to.

A web page can make its own host name resolve to any address (DNS rebinding). The browser then takes the
server at that address for part of the page's site, and the page can read all responses. But the Host header
still has the page's name. The attack needs a host name, so IP addresses are always allowed.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable

from calm.serving.errors import ApiError, quoted

ANY = "*"
_HOST = re.compile(r"(?P<name>\[[^\[\]]+\]|[^:\[\]]+)(:[0-9]*)?")
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?\.?", re.ASCII)


class Hosts:
    """The host names of a server.

    Args:
        names: Names besides `localhost` and that of this machine; "*.name" for all subdomains of a name, and
            "*" for any name.

    Raises:
        ValueError: If a name is not a valid host name.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        allowed = [name.strip().lower() for name in names]
        for name in allowed:
            if name != ANY and not is_host_name(name):
                raise ValueError(
                    f"'{name}' is not a host name; give a name without scheme, port or path, such as "
                    "'example.org' or '*.example.org'."
                )
        self._allows_any = ANY in allowed
        self._names = {name.rstrip(".") for name in (*allowed, "localhost", socket.gethostname().lower())}
        self._suffixes = tuple(name[1:] for name in self._names if name.startswith("*."))

    def check(self, host: str | None) -> None:
        """Raise ApiError for a Host header that is not this server's.

        Args:
            host: The header; None if it is missing, though browsers always send it.
        """
        if self._allows_any or host is None:
            return
        match = _HOST.fullmatch(host.strip().lower())
        name = match["name"] if match else ""
        is_allowed = bool(name) and (
            _is_address(name) or name.rstrip(".") in self._names or name.rstrip(".").endswith(self._suffixes)
        )
        if not is_allowed:
            raise ApiError(
                f"this server does not accept the host name '{quoted(host)}'; use its IP address, or start "
                "it with --allowed_hosts.",
                403,
                code="host_not_allowed",
            )


def is_host_name(text: str) -> bool:
    """Whether a text is a host name, an IP address, or a pattern of host names."""
    return _is_address(text) or _NAME.fullmatch(text.lower()) is not None


def _is_address(name: str) -> bool:
    inner = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    try:
        return ipaddress.ip_address(inner).version == (6 if inner is not name else 4)
    except ValueError:
        return False
