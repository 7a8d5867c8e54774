"""The texts of a request in the OpenAI API's format: as one object, or as events."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from calm.serving.protocol import ChatRequest, CompletionRequest
from calm.serving.readers import IsGone
from calm.serving.request_texts import Part, RequestTexts


class _Format:
    """The texts of one request, whole or in pieces.

    Args:
        texts: The texts, already submitted.
        request: The request.
        name: The model's name.
    """

    def __init__(self, texts: RequestTexts, request: CompletionRequest | ChatRequest, name: str) -> None:
        self._texts, self._request = texts, request
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    prefix = object_name = piece_name = ""

    async def whole(self, is_gone: IsGone) -> dict[str, Any] | None:
        """The whole response; None if the client has left."""
        number = len(self._texts.prompts) * self._texts.copies
        said, reasons = [self._opening(index) for index in range(number)], [""] * number
        chunks: list[list[dict[str, Any]]] = [[] for _ in range(number)]
        async for part in self._texts.parts(is_gone, as_it_comes=False):
            said[part.index] += part.text
            reasons[part.index] = part.finish_reason or ""
            chunks[part.index] += part.chunks
        if not all(reasons):
            return None
        choices = []
        for index, (text, reason) in enumerate(zip(said, reasons, strict=True)):
            choice = {"index": index, "finish_reason": reason, "logprobs": None, **self._said(text)}
            choices.append(choice | ({"chunks": chunks[index]} if self._request.return_chunks else {}))
        return {**self._head, "object": self.object_name, "choices": choices, "usage": self._texts.usage}

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream, one by one."""
        try:
            usage = self._request.stream_options is not None and self._request.stream_options.include_usage
            more = {"usage": None} if usage else {}
            for index in range(len(self._texts.prompts) * self._texts.copies):
                if (first := self._first(index)) is not None:
                    yield self._piece(index, first, None) | more
            async for part in self._texts.parts():
                if part.text or part.finish_reason or self._request.return_chunks:
                    yield self._piece(part.index, self._more(part), part.finish_reason, part) | more
            if usage:
                yield {**self._head, "object": self.piece_name, "choices": [], "usage": self._texts.usage}
        finally:  # The client may leave before the first part.
            self._texts.cancel()

    def _piece(
        self, index: int, said: dict[str, Any], reason: str | None, part: Part | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": reason, "logprobs": None, **said}
        if part is not None and self._request.return_chunks:
            choice["chunks"] = part.chunks
        return {**self._head, "object": self.piece_name, "choices": [choice]}

    def _opening(self, index: int) -> str:
        return ""

    def _said(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _first(self, index: int) -> dict[str, Any] | None:
        raise NotImplementedError

    def _more(self, part: Part) -> dict[str, Any]:
        raise NotImplementedError


class CompletionFormat(_Format):
    """The format of /v1/completions."""

    prefix, object_name, piece_name = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, texts: RequestTexts, request: CompletionRequest, name: str, echoes: list[str] | None
    ) -> None:
        super().__init__(texts, request, name)
        self._echoes = echoes

    def _opening(self, index: int) -> str:
        return self._echoes[index] if self._echoes else ""

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _first(self, index: int) -> dict[str, Any] | None:
        return {"text": self._echoes[index]} if self._echoes else None

    def _more(self, part: Part) -> dict[str, Any]:
        return {"text": part.text}


class ChatFormat(_Format):
    """The format of /v1/chat/completions."""

    prefix, object_name, piece_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _first(self, index: int) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def _more(self, part: Part) -> dict[str, Any]:
        return {"delta": {"content": part.text} if part.text else {}}
