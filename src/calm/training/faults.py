"""What can stop a run: losses or weights that are not finite, and SIGTERM."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from calm.errors import RunError
from calm.training.processes import processes


class LossWatch:
    """Finds the first step whose loss is not finite, without synchronizing with the device at every step."""

    def __init__(self, device: torch.device) -> None:
        self._bad_step = torch.full((), -1, dtype=torch.long, device=device)

    def record(self, loss: Tensor, step: int) -> None:
        """Record the loss of a step."""
        is_first = (self._bad_step < 0) & ~loss.detach().isfinite().all()
        self._bad_step = torch.where(is_first, step, self._bad_step)

    def check(self, resume_hint: str) -> None:
        """Stop the run on all processes if a loss was not finite on any.

        Args:
            resume_hint: From where the run can be resumed, for the message.

        Raises:
            RunError: If a loss was not finite.
        """
        bad_step = self._bad_step.clone()
        if processes().num_processes > 1:
            distributed.all_reduce(bad_step, distributed.ReduceOp.MAX)
        if bad_step >= 0:
            raise diverged(f"the loss of step {int(bad_step)}", resume_hint)


def diverged(subject: str, resume_hint: str) -> RunError:
    """The error for a run in which something is not finite.

    Args:
        subject: What is not finite.
        resume_hint: From where the run can be resumed.
    """
    return RunError(
        f"{subject} is not finite; {resume_hint}. A new run with a lower learning rate or gradient clipping "
        "(max_grad_norm) may help."
    )


def check_weights(model: nn.Module, step: int, resume_hint: str) -> None:
    """Raise RunError on all processes if a trained weight is not finite on any."""
    weights = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    is_bad = ~torch.stack(torch._foreach_norm(local)).isfinite().all()
    if processes().num_processes > 1:
        is_bad = is_bad.int()
        distributed.all_reduce(is_bad, distributed.ReduceOp.MAX)
    if is_bad:
        raise RunError(f"weights are not finite after step {step}; {resume_hint}.")


class StopOnSignal(TrainerCallback):
    """On SIGTERM, which schedulers send: finish the step, write a checkpoint, and stop.

    Afterwards, `has_stopped` says whether this has happened.
    """

    def __init__(self) -> None:
        self.has_stopped = False
        self._is_requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM inside the block; does nothing outside the main thread, where Python forbids it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if any process has received the signal."""
        is_requested = self._is_requested
        if processes().num_processes > 1:
            flag = torch.tensor(int(is_requested), device=processes().device)
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
            is_requested = bool(flag)
        if is_requested:
            self.has_stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def _request(self, *_: Any) -> None:
        self._is_requested = True
