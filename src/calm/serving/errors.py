"""Errors in the OpenAI API's format."""

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

_RETRY_SECONDS = "1"  # The queue may have room by then.
_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    429: {"retry-after": _RETRY_SECONDS},
    503: {"retry-after": _RETRY_SECONDS},
}
_JSON_TYPES = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
_MAX_QUOTED_CHARACTERS = 80


class ApiError(Exception):
    """An error response.

    Args:
        message: What is wrong, and what to do.
        status: HTTP status.
        kind: Error type of the API.
        param: The field at fault, such as `messages[2].content`.
        code: Machine-readable error code.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The HTTP response, with the headers for its status."""
        return JSONResponse(self.body, self.status, headers=_HEADERS.get(self.status))


def internal_error(request_id: str) -> ApiError:
    """The error for a bug in the server."""
    return ApiError(f"internal server error; see {request_id} in the server log.", 500, kind="server_error")


def error_at(param: str, message: str) -> ApiError:
    """An error in a value of the body, which `param` locates."""
    return ApiError(f"{param}: {message}", param=param)


def validation_error(error: ValidationError) -> ApiError:
    """The first validation error of a body, as one sentence."""
    first = error.errors(include_url=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{quoted(part)}" if param else quoted(part)
    if first["type"] == "missing":
        return ApiError(f"'{param}' is missing.", param=param)
    if first["type"] == "extra_forbidden":
        return ApiError(f"there is no argument '{param}'; leave it out.", param=param)
    if first["type"] == "model_type":
        return error_at(param, f"must be an object, got {json_type(first['input'])}.")
    if first["type"] == "too_long":
        return error_at(param, f"may have at most {first['ctx']['max_length']} values.")
    return error_at(param, f"{first['msg']}.")


def quoted(text: str) -> str:
    """A text as error messages quote it: on one line, truncated if it is long."""
    shown = repr(text[:_MAX_QUOTED_CHARACTERS])[1:-1]
    return shown if len(text) <= _MAX_QUOTED_CHARACTERS else f"{shown}..."


def json_type(value: Any) -> str:
    """The name of a value's JSON type, with an article."""
    return "null" if value is None else _JSON_TYPES.get(type(value), "an object")
