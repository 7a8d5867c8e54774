"""The texts of one request: submitted together, delivered as generated, cancelled when the client leaves."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from calm.models.generation.rows import Written
from calm.models.thoughts import Thoughts
from calm.serving.engine import Engine, Job, QueueFullError, StoppingError
from calm.serving.errors import ApiError
from calm.serving.readers import POLL_SECONDS, IsGone, Readers
from calm.serving.writers import AnySampler
from calm.text.decoding import TextBuilder, spell_tokens

_LONG_TEXT = 2000  # From this many tokens plus characters of stops on, a text is decoded off the event loop.


def queue_error(error: QueueFullError) -> ApiError:
    """The ApiError for work that the engine did not accept; the client may try again later."""
    if isinstance(error, StoppingError):
        return ApiError(str(error), 503, "server_error", code="shutting_down")
    return ApiError(str(error), 429, "rate_limit_error", code="queue_full")


@dataclass(frozen=True)
class Part:
    """A part of a text that can no longer change.

    Args:
        index: Index of the text in the request.
        text: The new text.
        finish_reason: "stop" or "length" in the last part.
        chunks: What was sampled, if the request asks for it.
    """

    index: int
    text: str
    finish_reason: str | None = None
    chunks: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class RequestTexts:
    """All texts of one request.

    Args:
        engine: The engine that generates them.
        tokenizer: The model's tokenizer.
        prompts: Token ids of each prompt.
        copies: Texts per prompt.
        sampler: How they are sampled.
        budget: Maximum new tokens of a text.
        seed: Seed of the request.
        stops: Stop strings.
        seconds: Time limit for all of them.
        readers: Decode long texts in their thread.
        with_chunks: Whether parts include what was sampled.
        thoughts: Thoughts after each prompt, if any.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Sequence[int]]
    copies: int
    sampler: AnySampler
    budget: int
    seed: int
    stops: Sequence[str]
    seconds: float
    readers: Readers
    with_chunks: bool = False
    thoughts: Thoughts | None = None

    def __post_init__(self) -> None:
        self._texts = [
            TextBuilder(self.tokenizer, self.stops, prompt)
            for prompt in self.prompts
            for _ in range(self.copies)
        ]
        self._arrived: deque[tuple[int, Written | Exception]] = deque()
        self._loop, self._wakeup, self._wakes_on_every_chunk = (
            asyncio.get_running_loop(),
            asyncio.Event(),
            True,
        )
        self._is_wakeup_scheduled = False
        self._deadline = time.monotonic() + self.seconds
        self._stop_length = sum(map(len, self.stops))
        num_copies: Counter[tuple[int, ...]] = Counter()  # So that equal prompts get different texts.
        self._jobs: list[Job] = []
        for prompt in self.prompts:
            key = tuple(prompt)
            for copy in range(num_copies[key], num_copies[key] + self.copies):
                deliver = self._delivery_to(len(self._jobs))
                self._jobs.append(
                    Job(
                        prompt,
                        self.sampler,
                        self.budget,
                        self.seed,
                        deliver,
                        copy,
                        self._deadline,
                        self.thoughts,
                    )
                )
            num_copies[key] += self.copies

    @property
    def number(self) -> int:
        """Number of texts."""
        return len(self._texts)

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts so far, in the API's format; a thought counts as a completion token."""
        num_prompt = sum(map(len, self.prompts))
        num_thoughts = self.number * (0 if self.thoughts is None else self.thoughts.number)
        num_completion = num_thoughts + sum(text.num_tokens for text in self._texts)
        usage: dict[str, Any] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        }
        if num_thoughts:
            usage["completion_tokens_details"] = {"reasoning_tokens": num_thoughts}
        return usage

    def submit(self) -> None:
        """Submit all texts to the engine.

        Raises:
            ApiError: If too many texts are waiting, or the server is shutting down.
        """
        try:
            self.engine.submit(self._jobs)
        except QueueFullError as error:
            raise queue_error(error) from error

    def cancel(self) -> None:
        """Cancel all texts."""
        self.engine.cancel(self._jobs)

    async def parts(self, is_gone: IsGone | None = None, incremental: bool = True) -> AsyncIterator[Part]:
        """Yield parts as they are generated; however this generator ends, the texts are cancelled.

        Args:
            is_gone: Awaited every half second: whether the client has left.
            incremental: Whether to wake up for every chunk. That takes time from the generating thread, so a
                request for whole texts sleeps until one ends.

        Raises:
            ApiError: If a text fails or takes too long.
        """
        unfinished, last_poll = set(range(self.number)), time.monotonic()
        self._wakes_on_every_chunk = incremental or bool(self.stops)
        try:
            while unfinished:
                if is_gone is not None and time.monotonic() - last_poll > POLL_SECONDS:
                    if await is_gone():
                        return
                    last_poll = time.monotonic()
                if time.monotonic() > self._deadline + POLL_SECONDS:  # The client reads too slowly.
                    raise _timeout_error("the answer took too long")
                try:
                    await asyncio.wait_for(self._wakeup.wait(), POLL_SECONDS)
                except asyncio.TimeoutError:  # Not the built-in TimeoutError before Python 3.11.
                    continue
                for index, results in self._drain():
                    if index in unfinished:
                        part = await self._part(index, results)
                        if part.finish_reason is not None:
                            unfinished.discard(index)
                        yield part
        finally:
            self.cancel()

    def _drain(self) -> list[tuple[int, list[Written | Exception]]]:
        """What has arrived; the chunks of a text are merged, unless each one is needed separately."""
        # Clear these first: whatever arrives from here on must set them again.
        self._wakeup.clear()
        self._is_wakeup_scheduled = False
        groups: list[tuple[int, list[Written | Exception]]] = []
        latest: dict[int, list[Written | Exception]] = {}  # The last group of each text.
        while self._arrived:
            index, result = self._arrived.popleft()
            if index in latest and not self.stops and not self.with_chunks:
                latest[index].append(result)
            else:
                latest[index] = [result]
                groups.append((index, latest[index]))
        return groups

    async def _part(self, index: int, results: list[Written | Exception]) -> Part:
        """The part that some chunks add to a text.

        Raises:
            ApiError: If the text has failed.
        """
        chunks = [_chunk_of(result) for result in results]
        builder, end = self._texts[index], chunks[-1].ended_by
        tokens = [token for chunk in chunks for token in chunk.tokens]
        if builder.num_tokens + self._stop_length < _LONG_TEXT:
            text = builder.add(tokens, end is not None)
        else:
            text = await self.readers.decode(lambda: builder.add(tokens, end is not None))
        reason = None
        if builder.is_stopped:
            self.engine.cancel([self._jobs[index]])
            reason = "stop"
        elif end is not None:
            reason = "stop" if end == "eos" else "length"
        described = [self._describe(chunk) for chunk in chunks] if self.with_chunks else []
        return Part(index, text, reason, described)

    def _describe(self, chunk: Written) -> dict[str, Any]:
        return {
            "token_ids": chunk.tokens,
            "tokens": spell_tokens(self.tokenizer, chunk.tokens),
            "num_draws": chunk.num_draws,
            "agreement": round(chunk.agreement, 4),
            "fell_back": chunk.fell_back,
        }

    def _delivery_to(self, index: int) -> Callable[[Written | Exception], None]:
        """The function that the engine's thread calls with each result for a text."""

        def deliver(result: Written | Exception) -> None:
            self._arrived.append((index, result))
            is_last = isinstance(result, Exception) or result.ended_by is not None
            if (self._wakes_on_every_chunk or is_last) and not self._is_wakeup_scheduled:
                self._is_wakeup_scheduled = True
                self._loop.call_soon_threadsafe(self._wakeup.set)

        return deliver


def _chunk_of(result: Written | Exception) -> Written:
    """Return a chunk, or raise the error that came in its place as an ApiError."""
    if isinstance(result, TimeoutError):
        raise _timeout_error(str(result))
    if isinstance(result, QueueFullError):
        raise queue_error(result)
    if isinstance(result, Exception):
        raise ApiError(f"the generation of the text failed ({result}).", 500, "server_error")
    return result


def _timeout_error(reason: str) -> ApiError:
    return ApiError(f"{reason}; ask for fewer tokens.", 504, "server_error", code="timeout")
