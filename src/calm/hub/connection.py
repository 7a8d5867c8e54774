"""The Hugging Face hub, where it may not be reached: ask once and briefly, then do with the local cache.

The libraries that load from the hub try again for most of a minute where there is no network.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id

_SECONDS_TO_ANSWER = 2.0
_SECONDS_REMEMBERED = 60.0
_GATEWAY_ERRORS = (502, 503, 504)  # Of a proxy, or a mirror that cannot reach the hub itself.
_remembered: dict[str, tuple[float, str | None]] = {}  # Endpoint -> when it was asked, and what was wrong.


def is_hub_name(name: str) -> bool:
    """Whether a name is one that the hub could have: "name" or "owner/name"."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def may_be_on_hub(name: str) -> bool:
    """Whether the hub is worth asking: for a hub name that does not begin with a folder here."""
    return is_hub_name(name) and ("/" not in name or not Path(name.partition("/")[0]).exists())


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within, libraries load from the hub if it answers, and otherwise only what they loaded before.

    Raises:
        ConnectionError: If the hub does not answer and the cache has not what was asked for.
    """
    reason = unreachable()
    if reason is None:
        yield
        return
    places: list[ModuleType] = [constants]
    if "datasets.config" in sys.modules:
        places.append(sys.modules["datasets.config"])  # It has a copy.
    before = [vars(place)["HF_HUB_OFFLINE"] for place in places]
    for place in places:
        vars(place)["HF_HUB_OFFLINE"] = True
    try:
        yield
    except OSError as error:  # What all of these libraries raise for a file that is not in the cache.
        raise ConnectionError(reason) from error
    finally:
        for place, value in zip(places, before, strict=True):
            vars(place)["HF_HUB_OFFLINE"] = value


def unreachable() -> str | None:
    """Why the hub (or the mirror in HF_ENDPOINT) cannot be reached, or None if it can.

    Where HF_HUB_OFFLINE is set, nothing asks the hub, and nothing is asked here. HF_HUB_ETAG_TIMEOUT sets
    how many seconds it may take to answer.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    endpoint = constants.ENDPOINT
    asked, reason = _remembered.get(endpoint, (-_SECONDS_REMEMBERED, None))
    if time.monotonic() - asked > _SECONDS_REMEMBERED:
        reason = _ask(endpoint)
        _remembered[endpoint] = time.monotonic(), reason
    return reason


def _ask(endpoint: str) -> str | None:
    host = urlsplit(endpoint).netloc or endpoint
    seconds = _seconds_to_answer()
    # Only a thread can be left behind: a name server that is silent obeys no timeout.
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_try_once(endpoint, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        return f"{host} did not answer within {seconds:g} s; HF_HUB_ETAG_TIMEOUT sets another limit"
    return None if found[0] is None else f"{host} cannot be reached: {found[0]}"


def _seconds_to_answer() -> float:
    try:
        return float(os.environ["HF_HUB_ETAG_TIMEOUT"])
    except (KeyError, ValueError):
        return _SECONDS_TO_ANSWER


def _try_once(endpoint: str, seconds: float) -> str | None:
    """What is wrong with one request through the hub's own client, which knows proxies and certificates."""
    try:
        answer = get_session().head(endpoint, timeout=seconds, follow_redirects=False)
    except Exception as error:  # Of the client, whichever it is.
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return f"status {answer.status_code}" if answer.status_code in _GATEWAY_ERRORS else None
