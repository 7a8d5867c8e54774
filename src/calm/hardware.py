"""The name of this machine's processor or accelerator, and how fast it is."""

import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from calm.models.loading import best_device

MIXED_PRECISION_PAYS = 1.1
"""Minimum speedup over float32 to use bfloat16; below it, the rounding is not worth it."""

_MIN_WIDTH = 128  # Of layers that oneDNN makes faster.
_EMULATED = 2e9  # FLOP/s below which a processor must be emulating a dtype.


def device_name() -> str:
    """The device that models run on, such as "NVIDIA H100" or "AMD EPYC 7763 (8 threads)"."""
    device = best_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{processor_name()} ({threads} thread{'s' * (threads != 1)})"


def processor_name() -> str:
    """The processor's model name if the system reports it, else its architecture."""
    name = ""
    if platform.system() == "Darwin":
        name = _output_of("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        lines = _cpuinfo().splitlines()
        name = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    return " ".join(name.split()) or platform.processor() or platform.machine()


def _cpuinfo() -> str:
    """What Linux says of the processor; empty elsewhere."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


@contextmanager
def fast_float32(device: torch.device, width: int) -> Iterator[None]:
    """Multiply float32 matrices with oneDNN instead of MKL where that is faster and as precise.

    On AMD processors MKL does not use AVX-512; oneDNN does, and large products are about twice as fast.
    PyTorch calls oneDNN for float32 only if it may use bfloat16 as well ("medium"), which it does not without
    AMX. With few rows oneDNN is slower, so this is meant for batches of blocks, not for generation. Attention
    over narrow heads is slower too, which layers of width 64 do not make up for.

    Args:
        device: Where the model is. The setting is of the whole process, and would round float32 on a GPU, so
            nothing changes unless this is a CPU.
        width: Hidden size of the model; if it is less than 128, nothing changes.
    """
    if device.type == "cpu" and width >= _MIN_WIDTH and _has_faster_float32():
        with _medium_precision():
            yield
    else:
        yield


def width_of(config: PreTrainedConfig) -> int:
    """Hidden size of a model; 0 if its configuration has another name for it."""
    return getattr(config.get_text_config(), "hidden_size", 0)


@contextmanager
def _medium_precision() -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # The user has chosen precisions of single backends.
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def _has_faster_float32() -> bool:
    """Whether this is an AMD processor with AVX-512, on which "medium" precision rounds nothing."""
    if "AuthenticAMD" not in _cpuinfo() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with _medium_precision():
        return all(_is_exact(rows) for rows in (32, 512, 4096))


def _is_exact(rows: int) -> bool:
    """Whether products with so many rows keep digits that bfloat16 does not have."""
    matrix = torch.full((rows, 256), 1 + 2**-20)
    return torch.equal(matrix @ torch.eye(256), matrix)


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a large square matrix product on a device: the most that training can reach.

    None if a GPU has no room left for the matrices beside the model. For a dtype that a processor only
    emulates, this is the rate of a small product.
    """
    # Its own generator, so that training draws the same random numbers with or without this.
    generator = torch.Generator(device).manual_seed(0)

    def rate(size: int, times: int) -> float:
        matrix = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
        # Reading a value waits for the device.
        seconds = _quickest(lambda: (matrix @ matrix)[0, 0].item(), times)
        return 2 * size**3 / seconds

    try:
        with fast_float32(device, _MIN_WIDTH):
            if device.type == "cpu" and (emulated := rate(128, 5)) < _EMULATED:
                return emulated
            return rate(8192 if device.type == "cuda" else 1024, 3)
    except torch.OutOfMemoryError:
        return None


@functools.cache
def thread_gain() -> float:
    """Speedup of a matrix product from one thread to all of torch's threads."""
    threads, matrix = torch.get_num_threads(), torch.ones(512, 512)
    seconds = {}
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            seconds[number] = _quickest(lambda: matrix @ matrix, 20)
    finally:
        torch.set_num_threads(threads)
    return seconds[1] / seconds[threads]


@functools.cache
def read_rate(device: torch.device) -> float:
    """Memory read bandwidth in bytes per second, which bounds the generation of a single text."""
    numbers = torch.ones(2**26, device=device)  # 256 MiB, more than fits in caches.
    return 4 * len(numbers) / _quickest(lambda: numbers.sum().item(), 3)


@functools.cache
def mixed_precision_gain(device: torch.device, width: int) -> float:
    """Speedup of training layers of a given width in bfloat16 autocast over float32.

    The median over five rounds, after a warm-up round. Each round times a forward and backward pass over
    1,024 positions in both dtypes.
    """
    with torch.random.fork_rng(), torch.enable_grad():
        layers = nn.Sequential(nn.Linear(width, 3 * width), nn.SiLU(), nn.Linear(3 * width, width)).to(device)
        positions = torch.randn(1024, width, device=device)

    def training_pass(is_half: bool) -> Callable[[], Any]:
        def run() -> float:
            with torch.enable_grad():
                with torch.autocast(device.type, torch.bfloat16, enabled=is_half):
                    loss: Tensor = layers(positions).square().mean()
                loss.backward()
            return loss.item()

        return run

    with fast_float32(device, width):
        rounds = [_quickest(training_pass(False), 1) / _quickest(training_pass(True), 1) for _ in range(6)]
    return statistics.median(rounds[1:])


def _quickest(run: Callable[[], Any], times: int) -> float:
    """Seconds that the fastest of several calls takes."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
