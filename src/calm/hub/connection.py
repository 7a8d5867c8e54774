"""The Hugging Face hub, which may be unreachable: ask once and briefly, then fall back to the local cache.

Without a network, the libraries that load from the hub would retry for most of a minute.
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
_GATEWAY_ERRORS = (502, 503, 504)  # From a proxy or a mirror that cannot reach the hub itself.
_remembered: dict[str, tuple[float, str | None]] = {}  # Endpoint -> when it was asked, and any problem.


def is_hub_name(name: str) -> bool:
    """Whether a name is a valid repository name: "name" or "owner/name"."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def may_be_on_hub(name: str) -> bool:
    """Whether to ask the hub about a name: if it is valid there and does not start with a local folder."""
    return is_hub_name(name) and ("/" not in name or not Path(name.partition("/")[0]).exists())


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Let libraries load from the hub inside the block if it answers, and otherwise only from their caches.

    Raises:
        ConnectionError: If the hub does not answer and the cache lacks what was asked for.
    """
    reason = why_unreachable()
    if reason is None:
        yield
        return
    modules: list[ModuleType] = [constants]
    if "datasets.config" in sys.modules:
        modules.append(sys.modules["datasets.config"])  # It has its own copy.
    before = [vars(module)["HF_HUB_OFFLINE"] for module in modules]
    for module in modules:
        vars(module)["HF_HUB_OFFLINE"] = True
    try:
        yield
    except OSError as error:  # All these libraries raise it for a file that is not in the cache.
        raise ConnectionError(reason) from error
    finally:
        for module, value in zip(modules, before, strict=True):
            vars(module)["HF_HUB_OFFLINE"] = value


def why_unreachable() -> str | None:
    """Why the hub (or the mirror in HF_ENDPOINT) cannot be reached; None if it can.

    If HF_HUB_OFFLINE is set, the libraries never ask the hub; it is not asked here either, and the result is
    None. HF_HUB_ETAG_TIMEOUT sets how many seconds it may take to answer.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    endpoint = constants.ENDPOINT
    asked_at, reason = _remembered.get(endpoint, (-_SECONDS_REMEMBERED, None))
    if time.monotonic() - asked_at > _SECONDS_REMEMBERED:
        reason = _ask(endpoint)
        _remembered[endpoint] = time.monotonic(), reason
    return reason


def _ask(endpoint: str) -> str | None:
    """Why the hub does not answer now; None if it does."""
    host = urlsplit(endpoint).netloc or endpoint
    seconds = _seconds_to_answer()
    # In a thread, because only that can be abandoned: DNS lookups ignore the timeout.
    outcome: list[str | None] = []
    thread = threading.Thread(target=lambda: outcome.append(_try_once(endpoint, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        return f"{host} did not answer within {seconds:g} s; set HF_HUB_ETAG_TIMEOUT to wait longer"
    return None if outcome[0] is None else f"{host} cannot be reached: {outcome[0]}"


def _seconds_to_answer() -> float:
    try:
        return float(os.environ["HF_HUB_ETAG_TIMEOUT"])
    except (KeyError, ValueError):
        return _SECONDS_TO_ANSWER


def _try_once(endpoint: str, seconds: float) -> str | None:
    """Send one request with the hub's own client, which handles proxies and certificates.

    Returns:
        What went wrong; None if the hub answered.
    """
    try:
        answer = get_session().head(endpoint, timeout=seconds, follow_redirects=False)
    except Exception as error:  # The type depends on the HTTP client.
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return f"status {answer.status_code}" if answer.status_code in _GATEWAY_ERRORS else None
