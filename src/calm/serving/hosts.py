"""The host names that a server answers to.

A web page can make its own host name resolve to any address (DNS rebinding). The browser then takes the
server at that address for a part of the page's site, and the page can read all responses. But the Host header
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
        ValueError: If one is not a valid host name.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        given = [name.strip().lower() for name in names]
        for name in given:
            if name != ANY and not is_name(name):
                raise ValueError(
                    f"'{name}' is not a host name; give a name without scheme, port or path, such as "
                    "'example.org' or '*.example.org'."
                )
        self._takes_any = ANY in given
        self._names = {name.rstrip(".") for name in (*given, "localhost", socket.gethostname().lower())}
        self._ends = tuple(name[1:] for name in self._names if name.startswith("*."))

    def check(self, host: str | None) -> None:
        """Raise ApiError for a Host header that is not this server's.

        Args:
            host: The header; None if it is missing, though browsers always send it.
        """
        if self._takes_any or host is None:
            return
        found = _HOST.fullmatch(host.strip().lower())
        name = found["name"] if found else ""
        is_own = bool(name) and (
            _is_address(name) or name.rstrip(".") in self._names or name.rstrip(".").endswith(self._ends)
        )
        if not is_own:
            raise ApiError(
                f"this server does not accept the host name '{quoted(host)}'; use its IP address, or start "
                "it with --allowed_hosts.",
                403,
                code="host_not_allowed",
            )


def is_name(text: str) -> bool:
    """Whether a text is a host name, an IP address, or a pattern of host names."""
    return _is_address(text) or _NAME.fullmatch(text.lower()) is not None


def _is_address(name: str) -> bool:
    inner = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    try:
        return ipaddress.ip_address(inner).version == (6 if inner is not name else 4)
    except ValueError:
        return False
