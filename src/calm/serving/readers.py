"""Work that would hold the event loop up, in threads of its own, for as long as somebody waits for it."""

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from calm.serving.errors import ApiError

IsGone = Callable[[], Awaitable[bool]]
"""Whether whoever asked has left."""

SECONDS_BETWEEN_LOOKS = 0.5  # At whether whoever asked is still there.
_Result = TypeVar("_Result")


async def unless_gone(work: "Future[_Result]", is_gone: IsGone, seconds: float = float("inf")) -> _Result:
    """What comes of some work, which is cancelled if nobody waits for it any more.

    Args:
        work: The work.
        is_gone: Awaited now and then.
        seconds: How long it may take, about.

    Raises:
        ApiError: If whoever asked has left, or it takes too long.
    """
    result, deadline = asyncio.wrap_future(work), time.monotonic() + seconds
    try:
        while not (await asyncio.wait({result}, timeout=SECONDS_BETWEEN_LOOKS))[0]:
            if time.monotonic() > deadline:
                raise ApiError(
                    "the request took too long to read; try later.", 504, "server_error", code="timeout"
                )
            if await is_gone():
                raise ApiError("the client left before its answer.", 499)
        return result.result()
    finally:
        result.cancel()


class Readers:
    """A thread that reads texts, one request after the other, and one that spells what is written.

    The first has a tokenizer to itself: what a tokenizer takes for a control token is a setting of it, which
    each call changes.

    Args:
        tokenizer: Copied.
        max_waiting: Requests that wait for their turn; more are refused.
        seconds: How long each may take, with its wait.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_waiting: int, seconds: float) -> None:
        self.tokenizer, self._seconds = copy.deepcopy(tokenizer), seconds
        self._max_waiting, self._num_waiting = max_waiting, 0
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="calm-reader")
        self._spelling = ThreadPoolExecutor(1, thread_name_prefix="calm-speller")

    async def run(self, work: Callable[[], _Result], is_gone: IsGone) -> _Result:
        """Do something in the thread.

        Args:
            work: What to do.
            is_gone: Whether whoever asked has left; then it is not begun.

        Raises:
            ApiError: If too much is waiting, it takes too long, or whoever asked has left.
        """
        if self._num_waiting >= self._max_waiting:
            raise ApiError(
                "too many requests wait to be read; try later.", 429, "rate_limit_error", code="queue_full"
            )
        try:
            begun = self._reading.submit(work)
        except RuntimeError as error:  # It has been stopped.
            raise ApiError(
                "the server is shutting down.", 503, "server_error", code="shutting_down"
            ) from error
        self._num_waiting += 1
        try:
            return await unless_gone(begun, is_gone, self._seconds)
        finally:
            self._num_waiting -= 1

    async def spell(self, work: Callable[[], _Result]) -> _Result:
        """Do something in the other thread, for a text that is being written."""
        return await asyncio.wrap_future(self._spelling.submit(work))

    def stop(self) -> None:
        """Begin nothing more."""
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._spelling.shutdown(wait=False, cancel_futures=True)
