"""How fast training runs: tokens per second, utilization, memory."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback

from calm.errors import InputError
from calm.flops import training_flops
from calm.hardware import matrix_rate
from calm.training.teacher import Teacher


class SpeedMeter(TrainerCallback):
    """Measures tokens per second and utilization since the last reading, and peak memory so far.

    Args:
        tokens: Tokens per optimizer step on this device.
        flops: FLOPs per token, if known.
        device: Where training runs.
        dtype: Dtype of its matrix products.
    """

    def __init__(self, tokens: int, flops: float | None, device: torch.device, dtype: torch.dtype) -> None:
        self._tokens, self._flops, self._device, self._dtype = tokens, flops, device, dtype
        self._step, self._since = 0, time.perf_counter()
        self._rate: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start measuring, from the step at which training starts or resumes."""
        self._rate = matrix_rate(self._device, self._dtype) if self._flops else None
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._step, self._since = state.global_step, time.perf_counter()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time spent inside the block."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # Kernels that were already launched count as training.
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def read(self, step: int) -> dict[str, float]:
        """Tokens per second of this device since the last call, share of `matrix_rate`, peak memory (GiB).

        The share is left out if the FLOPs are unknown, the memory where the system does not tell.
        """
        seconds, steps = time.perf_counter() - self._since, step - self._step
        self._step, self._since = step, time.perf_counter()
        if steps < 1:
            return {}
        rate = steps * self._tokens / seconds
        figures = {"tokens_per_second": round(rate, 1)}
        if (memory := _peak_memory(self._device)) is not None:
            figures["memory_gib"] = round(memory, 3)
        if self._flops and self._rate:
            figures["utilisation"] = round(rate * self._flops / self._rate, 4)
        return figures


def known_training_flops(
    config: PreTrainedConfig, context: int, teacher: Teacher | None = None
) -> float | None:
    """`calm.flops.training_flops`, plus those of a teacher; None if unknown."""
    try:
        return training_flops(config, context, None if teacher is None else teacher.network.config)
    except InputError:
        return None


def _peak_memory(device: torch.device) -> float | None:
    """Peak memory of the device, or of this process on a CPU, in GiB; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # noqa: PLC0415 (not on Windows)
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
