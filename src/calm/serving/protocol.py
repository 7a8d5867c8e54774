"""Request bodies of the OpenAI API, and checks of what a CALM supports."""

import secrets
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool, StrictStr, model_validator

from calm.core.samplers import Sampler
from calm.models.generation.sampler_registry import default_sampler, sampler_from
from calm.models.heads import HeadConfig
from calm.serving.errors import ApiError
from calm.serving.fields import check_fields
from calm.serving.messages import read_messages
from calm.serving.values import (
    ChunkTokens,
    Count,
    Integer,
    Number,
    Prompt,
    Prompts,
    Seed,
    Stops,
    ThoughtCount,
    WrittenTokens,
)

Messages = Annotated[
    list[dict[str, str]], PlainValidator(read_messages, json_schema_input_type=list[dict[str, Any]])
]


class _Body(BaseModel):
    """A JSON object in which null means the default, as if the field were missing."""

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {
            name: value for name, value in body.items() if value is not None or name not in cls.model_fields
        }


class StreamOptions(_Body):
    """What a stream contains besides text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # Padding against eavesdroppers: accepted, but not added.


def setting_error(error: ValueError) -> ApiError:
    """The ApiError for an unsupported sampling setting; it names the field."""
    names = ("num_draws", "max_draws", "top_p", "min_p", "sampler", "temperature")
    return ApiError(str(error), param=next((name for name in names if name in str(error)), None))


class SamplingRequest(_Body):
    """The fields that completions and chats share."""

    model_config = ConfigDict(extra="allow")  # `check` refuses them with better messages than pydantic's.
    prompt_name: ClassVar[str]
    model: str
    n: Integer = Field(1, ge=1, le=128)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    stop: Stops = Field(default_factory=list)
    seed: Seed | None = None
    temperature: Number | None = Field(None, ge=0)
    top_p: Number | None = Field(None, gt=0, le=1)
    # Our extensions.
    min_p: Number | None = Field(None, ge=0, le=1)
    sampler: StrictStr | None = None
    num_draws: Count | None = None
    max_draws: Count | None = None
    num_thoughts: ThoughtCount | None = None  # None for as many as the model was trained with.
    return_chunks: StrictBool = False

    def check(self, draws_limit: int) -> None:
        """Raise ApiError for unsupported fields and values.

        Args:
            draws_limit: Maximum draws per chunk that the server allows.
        """
        check_fields(self.model_extra or {})
        for name in ("num_draws", "max_draws"):
            if (getattr(self, name) or 0) > draws_limit:
                raise ApiError(f"'{name}' must be at most {draws_limit}.", param=name)

    def chosen_seed(self) -> int:
        """The seed of the request, or a random one if it has none."""
        return secrets.randbits(31) if self.seed is None else self.seed

    def sampler_for(self, head: HeadConfig, temperature: float, draws: int) -> Sampler:
        """The sampler of the request.

        Args:
            head: Configuration of the model's head.
            temperature: Default temperature.
            draws: Default number of draws per chunk.

        Raises:
            ApiError: If a value is out of range.
        """
        if self.temperature is not None:
            temperature = self.temperature
        if temperature > 1:
            raise ApiError(
                f"'temperature' must be between 0 and 1 for a CALM, got {temperature:g}.", param="temperature"
            )
        try:
            return sampler_from(
                sampler=self.sampler or default_sampler(head, temperature, self.top_p, self.min_p),
                temperature=temperature,
                num_draws=self.num_draws or draws,
                max_draws=self.max_draws or draws,
                top_p=self.top_p,
                min_p=self.min_p,
            )
        except ValueError as error:
            raise setting_error(error) from error


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt_name = "prompt"
    prompt: Prompts = Field(default_factory=lambda: [""])  # "" starts a new text.
    max_tokens: Count | None = None
    echo: StrictBool = False


class PoolRequest(_Body):
    """POST /v1/calm/pool: candidates for the next chunk."""

    model_config = ConfigDict(extra="forbid")
    model: str
    prompt: Prompt | None = None  # Either this
    messages: Messages | None = None  # or a chat.
    written: WrittenTokens = Field(default_factory=list)  # Token ids generated after it, in whole chunks.
    chunk: ChunkTokens = Field(default_factory=list)  # Returned in any case, even if it is never drawn.
    num_draws: Count | None = None  # None for as many as the server makes per chunk.
    num_thoughts: ThoughtCount | None = None  # Between the prompt and `written`.
    temperatures: list[Number] = Field(default_factory=lambda: [1.0], max_length=16)
    most: Integer = Field(12, ge=1, le=1000)
    seed: Seed | None = None


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    prompt_name = "messages"
    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
