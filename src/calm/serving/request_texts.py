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
from calm.serving.readers import SECONDS_BETWEEN_LOOKS, IsGone, Readers
from calm.serving.writers import HowToDraw
from calm.text.decoding import TextBuilder, spell_tokens


def of_queue(error: QueueFullError) -> ApiError:
    """The ApiError for work that the engine did not accept; the client may try again later."""
    if isinstance(error, StoppingError):
        return ApiError(str(error), 503, "server_error", code="shutting_down")
    return ApiError(str(error), 429, "rate_limit_error", code="queue_full")


_LONG_TEXT = 2000  # From this many tokens plus characters of stops on, a text is decoded off the event loop.


@dataclass(frozen=True)
class Part:
    """A part of a text that can no longer change.

    Args:
        index: Which text of the request.
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
        readers: Their thread decodes long texts.
        with_chunks: Whether parts include what was sampled.
        thoughts: Thoughts after each prompt, if any.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Sequence[int]]
    copies: int
    sampler: HowToDraw
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
        self._loop, self._is_awake, self._wakes_for_all = asyncio.get_running_loop(), asyncio.Event(), True
        self._is_woken = False
        self._deadline = time.monotonic() + self.seconds
        self._stop_length = sum(map(len, self.stops))
        written: Counter[tuple[int, ...]] = Counter()  # So that equal prompts get different texts.
        self._jobs: list[Job] = []
        for prompt in self.prompts:
            words = tuple(prompt)
            for copy in range(written[words], written[words] + self.copies):
                deliver = self._delivery(len(self._jobs))
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
            written[words] += self.copies

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts so far, in the API's format; a thought counts as a completion token."""
        read, made = sum(map(len, self.prompts)), sum(text.num_tokens for text in self._texts)
        thought = len(self._texts) * (0 if self.thoughts is None else self.thoughts.number)
        made += thought
        usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        return usage | ({"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {})

    def submit(self) -> None:
        """Submit all texts to the engine.

        Raises:
            ApiError: If too many texts are waiting, or the server is shutting down.
        """
        try:
            self.engine.submit(self._jobs)
        except QueueFullError as error:
            raise of_queue(error) from error

    def cancel(self) -> None:
        """Cancel all texts."""
        self.engine.cancel(self._jobs)

    async def parts(self, is_gone: IsGone | None = None, as_it_comes: bool = True) -> AsyncIterator[Part]:
        """Yield parts as they are generated; however this generator ends, the texts are cancelled.

        Args:
            is_gone: Awaited every half second: whether the client has left.
            as_it_comes: Whether to wake up for every chunk. That takes time from the generating thread, so
                a request for whole texts sleeps until one ends.

        Raises:
            ApiError: If a text fails or takes too long.
        """
        open_texts, looked = set(range(len(self._jobs))), time.monotonic()
        self._wakes_for_all = as_it_comes or bool(self.stops)
        try:
            while open_texts:
                if is_gone is not None and time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                    if await is_gone():
                        return
                    looked = time.monotonic()
                if time.monotonic() > self._deadline + SECONDS_BETWEEN_LOOKS:  # The client reads too slowly.
                    raise _took_too_long("the answer took too long")
                try:
                    await asyncio.wait_for(self._is_awake.wait(), SECONDS_BETWEEN_LOOKS)
                except asyncio.TimeoutError:  # Not the built-in TimeoutError before Python 3.11.
                    continue
                for index, piece in self._take():
                    if index in open_texts:
                        part = await self._part(index, piece)
                        if part.finish_reason is not None:
                            open_texts.discard(index)
                        yield part
        finally:
            self.cancel()

    def _take(self) -> list[tuple[int, list[Written | Exception]]]:
        """What has arrived; the chunks of a text are merged, unless each one is needed separately."""
        # Clear these first: whatever arrives from here on must set them again.
        self._is_awake.clear()
        self._is_woken = False
        pieces: list[tuple[int, list[Written | Exception]]] = []
        of_text: dict[int, list[Written | Exception]] = {}
        while self._arrived:
            index, what = self._arrived.popleft()
            if index in of_text and not self.stops and not self.with_chunks:
                of_text[index].append(what)
            else:
                of_text[index] = [what]
                pieces.append((index, of_text[index]))
        return pieces

    async def _part(self, index: int, piece: list[Written | Exception]) -> Part:
        """The part that some chunks add to a text.

        Raises:
            ApiError: If the text has failed.
        """
        chunks = [_checked(what) for what in piece]
        builder, end = self._texts[index], chunks[-1].ended_by
        tokens = [token for one in chunks for token in one.tokens]
        if builder.num_tokens + self._stop_length < _LONG_TEXT:
            new = builder.add(tokens, end is not None)
        else:
            new = await self.readers.spell(lambda: builder.add(tokens, end is not None))
        reason = None
        if builder.is_stopped:
            self.engine.cancel([self._jobs[index]])
            reason = "stop"
        elif end is not None:
            reason = "stop" if end == "eos" else "length"
        return Part(index, new, reason, [self._describe(one) for one in chunks] if self.with_chunks else [])

    def _describe(self, written: Written) -> dict[str, Any]:
        return {
            "token_ids": written.tokens,
            "tokens": spell_tokens(self.tokenizer, written.tokens),
            "num_draws": written.num_draws,
            "agreement": round(written.agreement, 4),
            "fell_back": written.fell_back,
        }

    def _delivery(self, index: int) -> Callable[[Written | Exception], None]:
        def deliver(what: Written | Exception) -> None:
            self._arrived.append((index, what))
            matters = self._wakes_for_all or isinstance(what, Exception) or what.ended_by is not None
            if matters and not self._is_woken:
                self._is_woken = True
                self._loop.call_soon_threadsafe(self._is_awake.set)

        return deliver


def _checked(what: Written | Exception) -> Written:
    """Return a chunk, or raise the error that came in its place as an ApiError."""
    if isinstance(what, TimeoutError):
        raise _took_too_long(str(what))
    if isinstance(what, QueueFullError):
        raise of_queue(what)
    if isinstance(what, Exception):
        raise ApiError(f"the generation of the text failed ({what}).", 500, "server_error")
    return what


def _took_too_long(what: str) -> ApiError:
    return ApiError(f"{what}; ask for fewer tokens.", 504, "server_error", code="timeout")
