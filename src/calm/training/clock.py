"""How long a training stage has taken, summed over all parts of an interrupted run."""

import time
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Clock(TrainerCallback, ExportableState):
    """Counts the seconds of a stage, including held-out evaluations and checkpoints.

    The count is saved with each checkpoint and restored on resuming, so steps that were lost and are repeated
    count once.
    """

    def __init__(self) -> None:
        self._earlier: float | None = 0.0
        self._start: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, or restore it; after a checkpoint without a time, it stays unknown."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step:
            self._earlier = saved["attributes"]["seconds"] if saved else None
        self._start = time.perf_counter()
        state.stateful_callbacks[type(self).__name__] = self.state()

    @property
    def seconds(self) -> float | None:
        """Seconds so far; None if unknown."""
        if self._earlier is None or self._start is None:
            return self._earlier
        return self._earlier + time.perf_counter() - self._start

    def state(self) -> dict[str, Any]:
        """What is saved with a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}


def seconds_of(logs: Iterable[list[dict[str, Any]]]) -> float | None:
    """Total seconds of several stages, from their logs; None if unknown for any of them.

    Args:
        logs: The log of each stage, as the Trainer keeps it.
    """
    last = [next((entry["seconds"] for entry in reversed(log) if "seconds" in entry), None) for log in logs]
    known = [seconds for seconds in last if seconds is not None]
    return sum(known) if known and len(known) == len(last) else None
