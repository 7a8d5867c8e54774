"""The texts of a request in the OpenAI API's format: as one object, or as events."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from calm.serving.protocol import ChatRequest, CompletionRequest
from calm.serving.readers import IsGone
from calm.serving.request_texts import Part, RequestTexts


class _Format:
    """The texts of one request, as one object or as the events of a stream.

    Args:
        texts: The texts, already submitted.
        request: The request.
        name: The model's name.
    """

    def __init__(self, texts: RequestTexts, request: CompletionRequest | ChatRequest, name: str) -> None:
        self._texts, self._request = texts, request
        self._common = {  # Of all objects.
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    id_prefix = object_name = event_name = ""

    async def response(self, is_gone: IsGone) -> dict[str, Any] | None:
        """The response as one object; None if the client has left."""
        number = self._texts.number
        texts, reasons = [self._echo(index) for index in range(number)], [""] * number
        chunks: list[list[dict[str, Any]]] = [[] for _ in range(number)]
        async for part in self._texts.parts(is_gone, incremental=False):
            texts[part.index] += part.text
            reasons[part.index] = part.finish_reason or ""
            chunks[part.index] += part.chunks
        if not all(reasons):
            return None
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            choice = {"index": index, "finish_reason": reason, "logprobs": None, **self._content(text)}
            if self._request.return_chunks:
                choice["chunks"] = chunks[index]
            choices.append(choice)
        return {**self._common, "object": self.object_name, "choices": choices, "usage": self._texts.usage}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream, one by one."""
        try:
            options = self._request.stream_options
            has_usage = options is not None and options.include_usage
            no_usage = {"usage": None} if has_usage else {}  # Only the last event has the counts.
            for index in range(self._texts.number):
                if (opening := self._opening(index)) is not None:
                    yield self._event(index, opening, None) | no_usage
            async for part in self._texts.parts():
                if part.text or part.finish_reason or self._request.return_chunks:
                    yield self._event(part.index, self._delta(part), part.finish_reason, part) | no_usage
            if has_usage:
                yield {**self._common, "object": self.event_name, "choices": [], "usage": self._texts.usage}
        finally:  # The client may leave before the first part.
            self._texts.cancel()

    def _event(
        self, index: int, content: dict[str, Any], reason: str | None, part: Part | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": reason, "logprobs": None, **content}
        if part is not None and self._request.return_chunks:
            choice["chunks"] = part.chunks
        return {**self._common, "object": self.event_name, "choices": [choice]}

    def _echo(self, index: int) -> str:
        """The prompt of a text if the response repeats it, otherwise ""."""
        return ""

    def _content(self, text: str) -> dict[str, Any]:
        """A complete text, as fields of its choice."""
        raise NotImplementedError

    def _opening(self, index: int) -> dict[str, Any] | None:
        """What the first event of a text contains; None for no such event."""
        raise NotImplementedError

    def _delta(self, part: Part) -> dict[str, Any]:
        """A part of a text, as fields of its choice in an event."""
        raise NotImplementedError


class CompletionFormat(_Format):
    """The format of /v1/completions."""

    id_prefix, object_name, event_name = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, texts: RequestTexts, request: CompletionRequest, name: str, echoes: list[str] | None
    ) -> None:
        super().__init__(texts, request, name)
        self._echoes = echoes

    def _echo(self, index: int) -> str:
        return self._echoes[index] if self._echoes else ""

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _opening(self, index: int) -> dict[str, Any] | None:
        return {"text": self._echoes[index]} if self._echoes else None

    def _delta(self, part: Part) -> dict[str, Any]:
        return {"text": part.text}


class ChatFormat(_Format):
    """The format of /v1/chat/completions."""

    id_prefix, object_name, event_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _opening(self, index: int) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def _delta(self, part: Part) -> dict[str, Any]:
        return {"delta": {"content": part.text} if part.text else {}}
