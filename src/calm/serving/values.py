"""Types of a request's values. No other type is converted to them, except that 16.0 counts as 16."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, StrictFloat, StrictInt

from calm.serving.errors import ApiError, at, json_type

_MOST_STOPS = 16
_LONGEST_STOP = 1000


def _whole(value: Any) -> Any:
    """Turn 16.0 into 16: JSON has only one number type."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[StrictInt, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1)]
ThoughtCount = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_tokens(value: Any, place: str) -> list[int]:
    """A list of token ids.

    Args:
        value: The list.
        place: Its place in the request, for the message.

    Raises:
        ApiError: If it is not a list, or contains anything but whole numbers.
    """
    if not isinstance(value, list):
        raise at(place, f"must be an array of token ids, got {json_type(value)}.")
    if all(type(one) is int for one in value):  # The common case, checked fast.
        return value
    ids = [_whole(one) for one in value]
    wrong = next((index for index, one in enumerate(ids) if not _is_token(one)), None)
    if wrong is not None:
        found = str(ids[wrong]) if isinstance(ids[wrong], float) else json_type(ids[wrong])
        raise at(f"{place}[{wrong}]", f"token ids must be whole numbers, got {found}.")
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
        found = json_type(value)
        raise at("prompt", f"must be a string, an array of token ids, or an array of either, got {found}.")
    if not value:
        raise ApiError("'prompt' is empty; give a text.", param="prompt")
    if isinstance(value[0], str):
        return [_text(one, f"prompt[{index}]", "like those before it") for index, one in enumerate(value)]
    if isinstance(value[0], list):
        for index, one in enumerate(value):
            if not isinstance(one, list):
                raise at(f"prompt[{index}]", f"must be an array like those before it, got {json_type(one)}.")
        return [read_tokens(one, f"prompt[{index}]") for index, one in enumerate(value)]
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
    raise at("prompt", f"must be a string or an array of token ids, got {json_type(value)}.")


def read_stops(value: Any) -> list[str]:
    """The stop strings of a request, as a list.

    Args:
        value: A string or a list of strings.

    Raises:
        ApiError: If it is neither, there are too many strings, or one is too long or empty.
    """
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise at("stop", f"must be a string or an array of strings, got {json_type(value)}.")
    if len(stops) > _MOST_STOPS:
        raise ApiError(f"'stop' takes up to {_MOST_STOPS} texts, got {len(stops)}.", param="stop")
    stops = [_text(stop, f"stop[{index}]") for index, stop in enumerate(stops)]
    if not all(0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise ApiError(
            f"'stop' takes up to {_MOST_STOPS} texts, none of them empty or longer than {_LONGEST_STOP} "
            "characters.",
            param="stop",
        )
    return stops


def _text(value: Any, place: str, more: str = "") -> str:
    if not isinstance(value, str):
        raise at(place, f"must be a string{' ' + more if more else ''}, got {json_type(value)}.")
    return value


Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Prompt = Annotated[str | list[int], PlainValidator(read_prompt, json_schema_input_type=str | list[int])]


def _tokens(place: str) -> PlainValidator:
    return PlainValidator(lambda value: read_tokens(value, place), json_schema_input_type=list[int])


Written = Annotated[list[int], _tokens("written")]
Chunk = Annotated[list[int], _tokens("chunk")]
Stops = Annotated[list[str], PlainValidator(read_stops, json_schema_input_type=str | list[str])]
