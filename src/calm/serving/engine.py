"""One thread generates all texts: they wait in a queue, join the batch, and are delivered chunk by chunk."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from calm.errors import reason_of
from calm.models.generation.batching import BatchLimits
from calm.models.generation.rows import Failed, Row, Written
from calm.models.thoughts import Thoughts
from calm.serving.writers import AnySampler, Writer

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """The queue is full."""


class StoppingError(QueueFullError):
    """The server is shutting down and accepts no more work."""


@dataclass(eq=False)
class Job:
    """A text to generate.

    Args:
        prompt: Token ids of the prompt.
        sampler: How it is sampled.
        budget: Maximum new tokens.
        seed: Determines the text, together with the prompt and the copy.
        deliver: Called in the engine's thread with every chunk, or with the error that ended the text.
        copy: Index among several texts with the same prompt and seed.
        deadline: `time.monotonic()` after which the text is given up.
        thoughts: Thoughts after the prompt, if any.
    """

    prompt: Sequence[int]
    sampler: AnySampler
    budget: int
    seed: int
    deliver: Callable[[Written | Exception], None]
    copy: int = 0
    deadline: float = float("inf")
    thoughts: Thoughts | None = None
    is_cancelled: bool = field(default=False, init=False)


@dataclass(eq=False)
class Task:
    """Other work with the model, done in pieces between generation steps.

    Args:
        pieces: Generator that does a piece of the work at each step, and returns the result.
        deadline: `time.monotonic()` after which the work is given up.
    """

    pieces: Generator[None, None, Any]
    deadline: float = float("inf")
    future: Future = field(default_factory=Future, init=False)  # Cancelled by whoever stops waiting for it.

    def advance(self) -> bool:
        """Do a piece, unless the future was cancelled; return whether there is more to do."""
        if self.future.cancelled():
            self.pieces.close()
            return False
        try:
            if self.deadline < time.monotonic():
                raise TimeoutError("the answer took too long")
            next(self.pieces)
        except StopIteration as end:
            result = end.value
            self._resolve(lambda: self.future.set_result(result))
        except Exception as error:
            self.fail(error)
        else:
            return True
        return False

    def fail(self, error: Exception) -> None:
        """End with an error instead of a result."""
        self.pieces.close()
        self._resolve(lambda: self.future.set_exception(error))

    def _resolve(self, set_outcome: Callable[[], None]) -> None:
        if self.future.set_running_or_notify_cancel():
            set_outcome()


@dataclass
class EngineStatistics:
    """What the engine has done since it started."""

    steps: int = 0
    chunks: int = 0
    tokens: int = 0
    draws: int = 0
    seconds: float = 0.0


class Engine:
    """Generates texts in a thread of its own.

    Args:
        writer: The model to generate with; nothing else may use its models meanwhile.
        limits: Limits on what is held in memory and done at once, for all texts together.
        max_waiting: Maximum number of texts in the queue.
    """

    def __init__(self, writer: Writer, limits: BatchLimits, max_waiting: int) -> None:
        self.statistics = EngineStatistics()
        self._writer, self._max_waiting = writer, max_waiting
        self._limits = limits
        self._batch = writer.new_batch(limits)
        self._rows: dict[Row, Job] = {}
        self._waiting: deque[Job] = deque()
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="calm-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Give up all texts and stop the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Texts waiting to be generated."""
        return len(self._waiting) + len(self._rows) - self.num_rows

    @property
    def num_tasks(self) -> int:
        """Unfinished tasks."""
        return len(self._tasks)

    @property
    def num_rows(self) -> int:
        """Texts being generated."""
        return min(len(self._rows), self._limits.max_rows)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue texts, all or none.

        Raises:
            QueueFullError: If the queue has no room for all of them.
            StoppingError: If the server is shutting down.
        """
        with self._changed:
            if self._is_stopping:
                raise StoppingError("the server is shutting down.")
            if self.num_waiting + len(jobs) > self._max_waiting:
                raise QueueFullError(
                    f"{self.num_waiting} of at most {self._max_waiting} texts are queued; try again later."
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel texts, whether queued or running; those that have ended are ignored."""
        with self._changed:
            for job in jobs:
                job.is_cancelled = True
            # Make room in the queue at once.
            self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
            self._changed.notify()

    def submit_task(
        self, pieces: Callable[[Any], Generator[None, None, Any]], seconds: float = float("inf")
    ) -> Future:
        """Queue other work with the model, which is done piece by piece between generation steps.

        Args:
            pieces: Takes the model, and returns a generator that does a piece of the work at each step and
                returns the result.
            seconds: Time limit.

        Returns:
            A future of the result; cancelling it ends the work at the next piece.

        Raises:
            QueueFullError: If too many tasks are waiting.
            StoppingError: If the server is shutting down.
        """
        task = Task(pieces(self._writer.model), time.monotonic() + seconds)
        with self._changed:
            if self._is_stopping:
                raise StoppingError("the server is shutting down.")
            # Drop those that nobody waits for, which makes room at once.
            self._tasks = deque(queued for queued in self._tasks if not queued.future.cancelled())
            if len(self._tasks) >= self._max_waiting:
                raise QueueFullError("too many requests are queued; try again later.")
            self._tasks.append(task)
            self._changed.notify()
        return task.future

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:
            logger.exception("the engine has failed and stopped")
        finally:  # Nobody may wait for a result that will never come.
            with self._changed:
                self._is_stopping = True
            end = StoppingError("the server is shutting down.")
            self._fail_all(end)
            for task in self._tasks:
                task.fail(end)
            self._tasks.clear()

    def _loop(self) -> None:
        while self._wait():
            self._advance_task()
            started = time.perf_counter()
            try:
                self._drop_rows()
                self._admit_jobs()
                results = self._batch.step()
            except Exception as error:
                logger.exception("a generation step failed")
                self._fail_all(error)
                continue
            self._count(results, time.perf_counter() - started)
            for result in results:
                self._deliver_row(result)

    def _deliver_row(self, result: Written | Failed) -> None:
        job = self._rows[result.row]
        if isinstance(result, Failed) or result.ended_by is not None:
            del self._rows[result.row]
        if isinstance(result, Failed):
            logger.error("the generation of a text failed", exc_info=result.error)
            _deliver(job, result.error)
        else:
            _deliver(job, result)

    def _wait(self) -> bool:
        """Wait until there is something to do; return False if the engine is stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or self._waiting or self._rows or self._tasks)
            return not self._is_stopping

    def _advance_task(self) -> None:
        """Do one piece of one task per step, so that texts keep advancing."""
        with self._changed:
            task = self._tasks[0] if self._tasks else None
        if task is not None and not task.advance():
            with self._changed:
                self._tasks = deque(queued for queued in self._tasks if queued is not task)

    def _drop_rows(self) -> None:
        """Drop the rows whose texts were cancelled or take too long."""
        now = time.monotonic()
        for row, job in list(self._rows.items()):
            if job.is_cancelled or job.deadline < now:
                self._batch.drop(row)
                del self._rows[row]
                if not job.is_cancelled:
                    _deliver(job, TimeoutError("the text took too long"))

    def _admit_jobs(self) -> None:
        """Move texts from the queue to the batch."""
        # Twice as many as are generated at once: the others' prompts are prefilled together, ahead of time.
        while len(self._rows) < 2 * self._limits.max_rows:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            if job.is_cancelled:
                continue
            if job.deadline < time.monotonic():
                _deliver(job, TimeoutError("the text was queued for too long"))
                continue
            try:
                row = self._batch.join(job.prompt, job.sampler, job.budget, job.seed, job.copy, job.thoughts)
            except Exception as error:
                logger.exception("a prompt could not be added to the batch")
                _deliver(job, error)
            else:
                self._rows[row] = job

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            jobs = [*self._rows.values(), *(self._waiting if self._is_stopping else ())]
            if self._is_stopping:
                self._waiting.clear()
        self._rows.clear()
        for job in jobs:
            _deliver(job, error)
        if not self._is_stopping:
            self._batch = self._writer.new_batch(self._limits)

    def _count(self, results: list[Written | Failed], seconds: float) -> None:
        chunks = [result for result in results if isinstance(result, Written)]
        self.statistics.steps += bool(chunks)
        self.statistics.chunks += len(chunks)
        self.statistics.tokens += sum(len(chunk.tokens) for chunk in chunks)
        self.statistics.draws += sum(chunk.num_draws for chunk in chunks)
        self.statistics.seconds += seconds


def _deliver(job: Job, result: Written | Exception) -> None:
    """Deliver a chunk or an error. The client may be gone, which must not affect other texts."""
    try:
        job.deliver(result)
    except Exception as error:
        logger.debug("a text could not be delivered (%s)", reason_of(error))
        job.is_cancelled = True
