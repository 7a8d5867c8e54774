"""Threads for work that would block the event loop, cancelled when nobody waits for it any more."""

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from calm.serving.errors import ApiError

IsGone = Callable[[], Awaitable[bool]]
"""Whether the client has left."""

POLL_SECONDS = 0.5  # Between checks that the client is still there.
_Result = TypeVar("_Result")


async def wait_for_result(work: "Future[_Result]", is_gone: IsGone, seconds: float = float("inf")) -> _Result:
    """Wait for the result of some work, and cancel the work if nobody waits for it any more.

    Args:
        work: The work.
        is_gone: Awaited every half second: whether the client has left.
        seconds: Approximate time limit.

    Raises:
        ApiError: If the client has left, or the work takes too long.
    """
    result, deadline = asyncio.wrap_future(work), time.monotonic() + seconds
    try:
        while not (await asyncio.wait({result}, timeout=POLL_SECONDS))[0]:
            if time.monotonic() > deadline:
                raise ApiError(
                    "the request took too long to read; try again later.", 504, "server_error", code="timeout"
                )
            if await is_gone():
                raise ApiError("the client disconnected before the response.", 499)
        return result.result()
    finally:
        result.cancel()


class Readers:
    """A thread that parses and tokenizes requests, one after the other, and one that decodes long texts.

    The first has its own copy of the tokenizer: whether a tokenizer parses control tokens is a setting that
    each call changes.

    Args:
        tokenizer: The tokenizer, which is copied.
        max_waiting: Requests that may wait for their turn; more are refused.
        seconds: Time limit of a request, including its wait.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_waiting: int, seconds: float) -> None:
        self.tokenizer, self._seconds = copy.deepcopy(tokenizer), seconds
        self._max_waiting, self._num_waiting = max_waiting, 0
        self._request_thread = ThreadPoolExecutor(1, thread_name_prefix="calm-reader")
        self._decoding_thread = ThreadPoolExecutor(1, thread_name_prefix="calm-speller")

    async def run(self, work: Callable[[], _Result], is_gone: IsGone) -> _Result:
        """Run a function in the thread for requests.

        Args:
            work: The function.
            is_gone: Whether the client has left; then the function is not started.

        Raises:
            ApiError: If too many requests wait, it takes too long, the client has left, or the server is
                shutting down.
        """
        if self._num_waiting >= self._max_waiting:
            raise ApiError(
                "too many requests are queued; try again later.", 429, "rate_limit_error", code="queue_full"
            )
        try:
            future = self._request_thread.submit(work)
        except RuntimeError as error:  # The thread has been stopped.
            raise ApiError(
                "the server is shutting down.", 503, "server_error", code="shutting_down"
            ) from error
        self._num_waiting += 1
        try:
            return await wait_for_result(future, is_gone, self._seconds)
        finally:
            self._num_waiting -= 1

    async def decode(self, work: Callable[[], _Result]) -> _Result:
        """Run a function in the thread for decoding, for a text that is being generated."""
        return await asyncio.wrap_future(self._decoding_thread.submit(work))

    def stop(self) -> None:
        """Start no more work."""
        self._request_thread.shutdown(wait=False, cancel_futures=True)
        self._decoding_thread.shutdown(wait=False, cancel_futures=True)
