"""`calm serve`: load a model, listen on a port, and shut down cleanly."""

import codecs
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm.errors import InputError
from calm.extras import require
from calm.models.calm import CalmForCausalLM
from calm.models.drafting.loading import load_draft
from calm.models.generation.sampler_registry import sampler_from
from calm.models.loading import load_language_model_and_tokenizer
from calm.models.thoughts import thoughts_of
from calm.serving.logs import fold_repeats

KEY_VARIABLE = "CALM_API_KEY"
_MAY_BE_ZERO = ("prefix_bytes",)


def run_server(
    model: str,
    host: str,
    port: int,
    head: dict[str, Any] | None,
    *,
    name: str | None,
    api_key_file: str | None,
    temperature: float,
    allowed_hosts: Sequence[str],
    draft: str | None,
    draft_chunks: int | None,
    **limits: Any,
) -> None:
    """Load a model and serve it until SIGINT or SIGTERM.

    Args:
        model: Folder or hub name.
        host: Address to listen on.
        port: Port to listen on; 0 picks a free one.
        head: Changes to how the head samples; None for none.
        name: The model's name in requests; None for that of its folder.
        api_key_file: File with the key that requests must send; None to look in the environment.
        temperature: Default temperature.
        allowed_hosts: Host names that the server answers to, besides `host` and the machine's own.
        draft: Folder or hub name of a CALM that drafts for a token-level model.
        draft_chunks: Chunks per draft; 1 if None.
        **limits: The other fields of `calm.serving.settings.ServerSettings`, all of them but `draws`.

    Raises:
        InputError: If a value or the model is invalid, or the address cannot be used.
    """
    require("the server", "fastapi", "prometheus-client", "pydantic", "uvicorn")
    import uvicorn  # noqa: PLC0415 (of an extra)

    from calm.serving.app import create_app  # noqa: PLC0415
    from calm.serving.connections import uvicorn_config  # noqa: PLC0415
    from calm.serving.hosts import Hosts, is_host_name  # noqa: PLC0415
    from calm.serving.settings import ServerSettings  # noqa: PLC0415
    from calm.serving.writers import DraftedWriter  # noqa: PLC0415

    for limit, value in limits.items():
        if not (value > 0 or (value == 0 and limit in _MAY_BE_ZERO)):  # Written so that NaN fails too.
            raise InputError(f"{limit} must be above 0, got {value}.")
    key = _read_key(api_key_file)
    settings = ServerSettings(
        name=name or Path(model).resolve().name,
        api_key=key,
        temperature=temperature,
        allowed_hosts=[*allowed_hosts, *([host] if is_host_name(host) else [])],
        **limits,
    )
    try:
        Hosts(allowed_hosts)
        sampler_from(temperature=temperature, num_draws=settings.draws, max_draws=settings.draws)
    except ValueError as error:
        raise InputError(str(error)) from error
    network, tokenizer = load_language_model_and_tokenizer(model, head)
    thoughts = thoughts_of(network.config)
    writer: CalmForCausalLM | DraftedWriter
    if draft is not None:
        if thoughts is not None:
            raise InputError(
                f"'{model}' was trained to think, which --draft does not support; leave --draft out."
            )
        writer = DraftedWriter(network, load_draft(draft, network, tokenizer), draft_chunks or 1)
    elif isinstance(network, CalmForCausalLM):
        writer = network
    else:
        raise InputError(
            f"'{model}' is not a CALM. Add --draft CALM to serve it here, or use a server such as vLLM."
        )
    if thoughts is not None and thoughts.number > settings.max_thoughts:
        raise InputError(
            f"'{model}' uses {thoughts.number} thoughts per text, but max_thoughts is "
            f"{settings.max_thoughts}; raise it."
        )
    with _listen(host, port) as listener:
        app = create_app(writer, tokenizer, settings)
        actual_port = listener.getsockname()[1]
        url = _url(host, actual_port)
        print(f"serving '{settings.name}' at {url}/v1" + ("" if key else ", without an API key"))
        if draft is None:
            print(f"playground: {_url(_browser_host(host), actual_port)}/")
        sys.stdout.flush()
        config = uvicorn_config(app, settings)
        fold_repeats()
        uvicorn.Server(config).run(sockets=[listener])


def _read_key(file: str | None) -> str | None:
    """The key that requests must send, from a file or the environment."""
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        raw = Path(file).read_bytes()
        utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        # Bytes that are not UTF-8 become surrogates, as in environment variables.
        key = raw.decode("utf-16") if utf16 else raw.decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as error:
        raise InputError(f"the API key file '{file}' cannot be read ({error}).") from error
    key = key.strip()
    if not key:
        raise InputError(f"the API key file '{file}' is empty.")
    return key


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _browser_host(host: str) -> str:
    """A host that a browser on this machine can open, in place of a wildcard address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "localhost"
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:  # The last for names such as "a..b".
        raise InputError(
            f"cannot listen on {host}, port {port} ({error}); choose another --port or --host."
        ) from error
