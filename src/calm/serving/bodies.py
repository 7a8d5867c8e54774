"""Request bodies: JSON objects, validated with a pydantic model, whatever their content type."""

import codecs
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from calm.serving.errors import ApiError, json_type, validation_error
from calm.serving.readers import Readers

_Model = TypeVar("_Model", bound=BaseModel)
_LONG_BODY = 1 << 15  # Bodies of at least so many bytes are parsed off the event loop.


async def read_body(request: Request, model: type[_Model], max_bytes: int, readers: Readers) -> _Model:
    """Read and validate the body of a request.

    Args:
        request: The request.
        model: The pydantic model to validate it with.
        max_bytes: Maximum length.
        readers: Parse long bodies in their thread.

    Raises:
        ApiError: If it is from a page of another origin, too long, not a JSON object, or invalid.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    _check_origin(request, content_type)
    if content_type.startswith("multipart/"):
        raise ApiError("the body is multipart form data; send a JSON object.")
    raw = await _read_bytes(request, max_bytes)
    if len(raw) < _LONG_BODY:
        return _validate(raw, model)
    return await readers.run(lambda: _validate(raw, model), request.is_disconnected)


def _validate(raw: bytes, model: type[_Model]) -> _Model:
    try:
        return model.model_validate(parse_object(raw))
    except ValidationError as error:
        raise validation_error(error) from error


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        raw: Its bytes, in UTF-8, with or without a byte order mark.

    Raises:
        ApiError: If the bytes are anything else.
    """
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        raise ApiError("the body is empty; send a JSON object.")
    encoding = json.detect_encoding(raw)
    if encoding != "utf-8":
        raise ApiError(f"the body is in {encoding[:6].upper()}; send it in UTF-8.")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8 (byte {error.start}); send a JSON object in UTF-8.") from error
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(_json_error(str(error))) from error
    if not isinstance(body, dict):
        raise ApiError(f"the body is {json_type(body)}; send a JSON object.")
    return body


def _json_error(reason: str) -> str:
    if "hex escape" in reason:
        return "a string in the body has a lone surrogate or an incomplete escape; remove it."
    if "recursion" in reason:
        return "the body is nested too deeply; send a flat JSON object."
    return f"the body is not valid JSON ({reason}); send a JSON object."


def _check_origin(request: Request, content_type: str) -> None:
    """Refuse what a page of another origin can send without a preflight request.

    Browsers send a preflight request (which is not granted here) before JSON for another origin, but not
    before a form or plain text. They send the page's origin along; other clients send none.
    """
    origin = request.headers.get("origin")
    if origin is None or content_type == "application/json":
        return
    server_origin = f"{request.scope['scheme']}://{request.headers.get('host', '')}"
    if origin.lower() != server_origin.lower():
        raise ApiError(
            "cross-origin requests must have the content type application/json.",
            403,
            code="origin_not_allowed",
        )


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    if (request.headers.get("content-encoding") or "identity").lower() != "identity":
        raise ApiError("the body is compressed; send it uncompressed, without content-encoding.", 415)
    too_long = ApiError(f"the body exceeds the limit of {max_bytes} bytes; shorten it.", 413)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_long
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise too_long
            parts.append(part)
    except ClientDisconnect as error:
        raise ApiError("the client disconnected before the end of the body.", 499) from error
    return b"".join(parts)
