"""What requests may hold, in the words of the OpenAI API, and what of it a CALM can honour."""

import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from calm.core.temperature import TemperatureSettings
from calm.data.sources import has_half_a_pair

# Fields of the OpenAI API that have no meaning where chunks are drawn, or none here, and what they may be.
_NEEDS_LIKELIHOODS = "this model draws text by the chunk, without scores of tokens"
_NOT_HONOURED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((None, False), _NEEDS_LIKELIHOODS),
    "top_logprobs": ((None,), _NEEDS_LIKELIHOODS),
    "logit_bias": ((None, {}), _NEEDS_LIKELIHOODS),
    "presence_penalty": ((None, 0), _NEEDS_LIKELIHOODS),
    "frequency_penalty": ((None, 0), _NEEDS_LIKELIHOODS),
    "best_of": ((None, 1), _NEEDS_LIKELIHOODS),
    "suffix": ((None, ""), "text is written forwards only"),
    "tools": ((None, []), "there are no tools"),
    "tool_choice": ((None, "none", "auto"), "there are no tools"),
    "functions": ((None, []), "there are no tools"),
    "function_call": ((None, "none", "auto"), "there are no tools"),
    "response_format": ((None, {"type": "text"}), "answers are plain text"),
    "store": ((None, False), "nothing is stored"),
    "modalities": ((None, ["text"]), "answers are text"),
    "reasoning_effort": ((None, "none"), "the model does not reason"),
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        message: What is wrong, and what to do.
        status: HTTP status.
        kind: The error type of the API.
        param: The field that is wrong.
        code: A word for programs.
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


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False  # Padding against eavesdroppers, which is not made here.


class _Sampling(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="allow")  # Looked at by `check`, which says more than pydantic would.
    model: str
    n: StrictInt = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: StrictInt | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    # Ours.
    min_p: float | None = None
    sampler: Literal["exact", "pool", "head"] | None = None
    num_draws: StrictInt | None = Field(None, ge=1)
    max_draws: StrictInt | None = Field(None, ge=1)
    return_chunks: bool = False

    @model_validator(mode="before")
    @classmethod
    def _can_be_written(cls, body: Any) -> Any:
        if has_half_a_pair(json.dumps(body, ensure_ascii=False)):
            raise ApiError("the request has half a surrogate pair in a text; leave it out.")
        return body

    def check(self, most_draws: int) -> None:
        """Raise ApiError for what cannot be honoured.

        Args:
            most_draws: Draws of a chunk that the server allows.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in _NOT_HONOURED:
                raise ApiError(f"there is no argument '{name}'; leave it out.", param=name)
            allowed, reason = _NOT_HONOURED[name]
            # 0 is not False here: `logprobs=0` asks for something.
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                raise ApiError(
                    f"'{name}' cannot be honoured: {reason}. Leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )
        if len(self.stops) > 16 or any(not stop for stop in self.stops):
            raise ApiError("'stop' takes up to 16 texts, none of them empty.", param="stop")
        for name in ("num_draws", "max_draws"):
            if (getattr(self, name) or 0) > most_draws:
                raise ApiError(f"'{name}' may be {most_draws} at most.", param=name)

    @property
    def stops(self) -> list[str]:
        """The stops as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def chosen_seed(self) -> int:
        """The seed that was given, or one of chance."""
        return secrets.randbits(31) if self.seed is None else self.seed

    def settings(
        self, defaults: TemperatureSettings, default_sampler: Callable[[float], str]
    ) -> TemperatureSettings:
        """How chunks are sampled.

        `top_p` and `min_p` cut a pool of draws, so they choose the pool sampler where none is named.

        Args:
            defaults: Where the request says nothing.
            default_sampler: Chooses a sampler by the temperature where none is named.

        Raises:
            ApiError: If a value is out of range.
        """
        names = ("temperature", "top_p", "min_p", "sampler", "num_draws", "max_draws")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        cuts = given.get("top_p", 1) < 1 or given.get("min_p", 0) > 0
        given.setdefault(
            "sampler", "pool" if cuts else default_sampler(given.get("temperature", defaults.temperature))
        )
        if given.get("temperature", 0) > 1:
            raise ApiError(
                f"'temperature' lies between 0 and 1 for a CALM, got {self.temperature:g}.",
                param="temperature",
            )
        try:
            return replace(defaults, **given)
        except ValueError as error:
            raise ApiError(str(error)) from error


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: StrictInt = Field(16, ge=1)
    echo: bool = False

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        return [prompt] if is_one else prompt


class PoolRequest(BaseModel):
    """POST /v1/calm/pool: what could come next."""

    model_config = ConfigDict(extra="forbid")
    model: str
    prompt: str | list[StrictInt]
    written: list[StrictInt] = Field(default_factory=list)  # Tokens behind the prompt, whole chunks.
    num_draws: StrictInt = Field(200, ge=1)
    temperatures: list[float] = Field(default_factory=lambda: [1.0], max_length=16)
    most: StrictInt = Field(12, ge=1, le=1000)
    seed: StrictInt | None = None


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="ignore")
    role: str
    content: str | list[TextPart]

    def as_text(self) -> dict[str, str]:
        """Role and content as templates take them."""
        parts = self.content if isinstance(self.content, list) else None
        return {"role": self.role, "content": "".join(p.text for p in parts) if parts else str(self.content)}


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
