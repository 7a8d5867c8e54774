"""Every field of the OpenAI API, and how it is treated. Null means the default and is always accepted."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calm.serving.errors import ApiError, json_type, quoted

PATHS = ("/v1/completions", "/v1/chat/completions")
COMPLETIONS, CHATS = PATHS


@dataclass(frozen=True)
class Honoured:
    """Supported as the API defines it, on these paths."""

    paths: tuple[str, ...] = PATHS


@dataclass(frozen=True)
class Ignored:
    """Any value of a type is accepted and ignored, since it does not affect the text."""

    type: type


@dataclass(frozen=True)
class Refused:
    """Not supported, for a reason: only its defaults are accepted."""

    reason: str
    defaults: tuple[Any, ...] = ()

    @property
    def accepted(self) -> str:
        """The accepted values, in words."""
        return " or ".join([*map(json.dumps, self.defaults), "null"])


_NO_PROBABILITIES = "this model generates text in chunks, without token probabilities"
_NO_TOOLS = "this server has no tool calling"

FIELDS: dict[str, Honoured | Ignored | Refused] = {
    "model": Honoured(),
    "prompt": Honoured((COMPLETIONS,)),
    "messages": Honoured((CHATS,)),
    "max_tokens": Honoured(),
    "max_completion_tokens": Honoured((CHATS,)),
    "n": Honoured(),
    "stream": Honoured(),
    "stream_options": Honoured(),
    "stop": Honoured(),
    "seed": Honoured(),
    "temperature": Honoured(),
    "top_p": Honoured(),
    "echo": Honoured((COMPLETIONS,)),
    # Bookkeeping and caches.
    "user": Ignored(str),
    "metadata": Ignored(dict),
    "safety_identifier": Ignored(str),
    "prompt_cache_key": Ignored(str),
    "prompt_cache_options": Ignored(dict),
    "prompt_cache_retention": Ignored(str),
    "parallel_tool_calls": Ignored(bool),
    # What needs token probabilities, and features that do not exist here.
    "logprobs": Refused(_NO_PROBABILITIES, (False,)),
    "top_logprobs": Refused(_NO_PROBABILITIES, (0,)),
    "logit_bias": Refused(_NO_PROBABILITIES, ({},)),
    "presence_penalty": Refused(_NO_PROBABILITIES, (0,)),
    "frequency_penalty": Refused(_NO_PROBABILITIES, (0,)),
    "best_of": Refused(_NO_PROBABILITIES, (1,)),
    "suffix": Refused("text is only generated left to right", ("",)),
    "tools": Refused(_NO_TOOLS, ([],)),
    "tool_choice": Refused(_NO_TOOLS, ("none", "auto")),
    "functions": Refused(_NO_TOOLS, ([],)),
    "function_call": Refused(_NO_TOOLS, ("none", "auto")),
    "response_format": Refused("answers are plain text", ({"type": "text"},)),
    "modalities": Refused("answers are text", (["text"],)),
    "audio": Refused("answers are text"),
    "store": Refused("nothing is stored", (False,)),
    "service_tier": Refused("there is only one service tier", ("auto", "default")),
    "reasoning_effort": Refused("the number of thoughts is set by 'num_thoughts'", ("none",)),
    "verbosity": Refused("the length is up to the model and 'max_tokens'", ("medium",)),
    "prediction": Refused("this model cannot use predicted outputs"),
    "moderation": Refused("there is no moderation"),
    "web_search_options": Refused("there is no web search"),
}


def check_fields(extra: Mapping[str, Any]) -> None:
    """Check the fields that the request's pydantic model does not have.

    Args:
        extra: These fields and their values.

    Raises:
        ApiError: If a field does not exist, or asks for something unsupported.
    """
    for name, value in extra.items():
        if name not in FIELDS:
            raise ApiError(f"there is no argument '{quoted(name)}'; leave it out.", param=quoted(name))
        if value is None:
            continue
        rule = FIELDS[name]
        if isinstance(rule, Honoured):
            raise ApiError(f"'{name}' is an argument of {rule.paths[0]}; leave it out.", param=name)
        if isinstance(rule, Ignored):
            _check_type(name, value, rule.type)
        elif not any(_is_same(value, default) for default in rule.defaults):
            raise ApiError(
                f"'{name}' is not supported: {rule.reason}. Leave it out or send {rule.accepted}.",
                param=name,
                code="unsupported_parameter",
            )


def _check_type(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise ApiError(f"'{name}' must be {json_type(expected())}, got {json_type(value)}.", param=name)
    if isinstance(value, dict) and name == "metadata":
        _check_metadata(value)


def _check_metadata(pairs: dict[str, Any]) -> None:
    """Apply the limits of the API."""
    if len(pairs) > 16:
        raise ApiError(f"'metadata' may have at most 16 pairs, got {len(pairs)}.", param="metadata")
    for key, value in pairs.items():
        if not isinstance(value, str):
            raise ApiError("the values of 'metadata' must be strings.", param="metadata")
        if len(key) > 64 or len(value) > 512:
            raise ApiError(
                "keys of 'metadata' may have at most 64 characters, and values at most 512.",
                param="metadata",
            )


def _is_same(value: Any, default: Any) -> bool:
    """Equality in which 0 is not False: `logprobs=0` asks for log probabilities."""
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)
