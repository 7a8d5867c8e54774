"""Types of a request's values. Nothing is converted, except that 16.0 counts as 16."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, StrictFloat, StrictInt

from calm.serving.errors import ApiError, error_at, json_type

_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000


def _as_integer(value: Any) -> Any:
    """Turn 16.0 into 16: JSON has only one number type."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[StrictInt, BeforeValidator(_as_integer)]
Count = Annotated[Integer, Field(ge=1)]
ThoughtCount = Annotated[Integer, Field(ge=0)]
Seed = Annotated[Integer, Field(ge=-(2**63), le=2**63 - 1)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_tokens(value: Any, param: str) -> list[int]:
    """A list of token ids.

    Args:
        value: The list.
        param: Where it is in the request, for the message.

    Raises:
        ApiError: If it is not a list, or contains anything but whole numbers.
    """
    if not isinstance(value, list):
        raise error_at(param, f"must be an array of token ids, got {json_type(value)}.")
    if all(type(token) is int for token in value):  # The common case, checked fast.
        return value
    ids = [_as_integer(token) for token in value]
    for index, token in enumerate(ids):
        if not _is_token(token):
            got = str(token) if isinstance(token, float) else json_type(token)
            raise error_at(f"{param}[{index}]", f"token ids must be whole numbers, got {got}.")
    return ids


def read_prompts(value: Any) -> list[str] | list[list[int]]:
    """The prompts of a completion request, as a list.

    Args:
        value: A text, token ids, or a list of either.

    Raises:
        ApiError: If it is none of these.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        got = json_type(value)
        raise error_at(
            "prompt", f"must be a string, an array of token ids, or an array of either, got {got}."
        )
    if not value:
        raise ApiError("'prompt' is empty; give a text.", param="prompt")
    if isinstance(value[0], str):
        return [_text(text, f"prompt[{index}]", " like those before it") for index, text in enumerate(value)]
    if isinstance(value[0], list):
        for index, ids in enumerate(value):
            if not isinstance(ids, list):
                raise error_at(
                    f"prompt[{index}]", f"must be an array like those before it, got {json_type(ids)}."
                )
        return [read_tokens(ids, f"prompt[{index}]") for index, ids in enumerate(value)]
    return [read_tokens(value, "prompt")]


def read_prompt(value: Any) -> str | list[int]:
    """One prompt: a text or token ids.

    Raises:
        ApiError: If it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return read_tokens(value, "prompt")
    raise error_at("prompt", f"must be a string or an array of token ids, got {json_type(value)}.")


def read_stops(value: Any) -> list[str]:
    """The stop strings of a request, as a list.

    Args:
        value: A string or a list of strings.

    Raises:
        ApiError: If it is neither, there are too many strings, or one is too long or empty.
    """
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise error_at("stop", f"must be a string or an array of strings, got {json_type(value)}.")
    if len(stops) > _MAX_STOPS:
        raise ApiError(f"'stop' takes up to {_MAX_STOPS} texts, got {len(stops)}.", param="stop")
    stops = [_text(stop, f"stop[{index}]") for index, stop in enumerate(stops)]
    if not all(0 < len(stop) <= _MAX_STOP_LENGTH for stop in stops):
        raise ApiError(
            f"'stop' takes up to {_MAX_STOPS} texts, none of them empty or longer than {_MAX_STOP_LENGTH} "
            "characters.",
            param="stop",
        )
    return stops


def _text(value: Any, param: str, suffix: str = "") -> str:
    if not isinstance(value, str):
        raise error_at(param, f"must be a string{suffix}, got {json_type(value)}.")
    return value


Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Prompt = Annotated[str | list[int], PlainValidator(read_prompt, json_schema_input_type=str | list[int])]


def _tokens(param: str) -> PlainValidator:
    return PlainValidator(lambda value: read_tokens(value, param), json_schema_input_type=list[int])


WrittenTokens = Annotated[list[int], _tokens("written")]
ChunkTokens = Annotated[list[int], _tokens("chunk")]
Stops = Annotated[list[str], PlainValidator(read_stops, json_schema_input_type=str | list[str])]
