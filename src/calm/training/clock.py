"""How long a stage of training has taken, over all parts of a run that was stopped."""

import time
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Clock(TrainerCallback, ExportableState):
    """Seconds of a stage, held-out evaluations and checkpoints included.

    They are written with each checkpoint, and a run that resumes goes on from there; the time of steps that
    were lost, and are taken again, counts once.
    """

    def __init__(self) -> None:
        self._before: float | None = 0.0
        self._start: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training begins, or resumes from a checkpoint; one that tells no time leaves it unknown."""
        noted = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step:
            self._before = noted["attributes"]["seconds"] if noted else None
        self._start = time.perf_counter()
        state.stateful_callbacks[type(self).__name__] = self.state()

    @property
    def seconds(self) -> float | None:
        """Seconds so far; None if they are not known."""
        if self._before is None or self._start is None:
            return self._before
        return self._before + time.perf_counter() - self._start

    def state(self) -> dict[str, Any]:
        """What is written with a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}


def seconds_of(logs: Iterable[list[dict[str, Any]]]) -> float | None:
    """Seconds of stages together, from what each has logged; None if they are not known of one.

    Args:
        logs: Logged figures of each stage, as the Trainer keeps them.
    """
    last = [next((entry["seconds"] for entry in reversed(log) if "seconds" in entry), None) for log in logs]
    known = [seconds for seconds in last if seconds is not None]
    return sum(known) if known and len(known) == len(last) else None
