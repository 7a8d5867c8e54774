"""Shared by the benchmarks: interleaved timing, peak memory, the name of the machine, and result files."""

import gc
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from calm.core.brier import DocumentSums
from calm.evaluation.brier import BrierResult

Name = TypeVar("Name")
Row = dict[str, Any]
Cases = dict[str, Callable[[float], list[Row]]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def json_rows(value: Any, indent: int = 0) -> str:
    """Format a result as JSON that diffs well: each setting and each row of a table on its own line.

    Args:
        value: Anything that JSON can represent.
        indent: Current indentation, in spaces.
    """
    inner = " " * (indent + 1)
    if isinstance(value, dict) and value:
        lines = [
            f"{inner}{json.dumps(str(name))}: {json_rows(item, indent + 1)}" for name, item in value.items()
        ]
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"
    if isinstance(value, list) and any(isinstance(row, dict | list) for row in value):
        return "[\n" + ",\n".join(inner + json.dumps(row) for row in value) + "\n" + " " * indent + "]"
    return json.dumps(value)


def rows_of(sums: DocumentSums) -> list[list[float]]:
    """Number, target count and sums of Brier-1 to Brier-4 of each document, to compare models by pairs."""
    columns = sums.document_D.tolist(), sums.count_D.tolist(), sums.total_DX[:, :4].tolist()
    return [
        [number, count, *(round(value, 6) for value in total)]
        for number, count, total in zip(*columns, strict=True)
    ]


def sums_of(rows: list[list[float]]) -> DocumentSums:
    """The inverse of `rows_of`."""
    table = torch.tensor(rows, dtype=torch.float64)
    return DocumentSums(table[:, 0].long(), table[:, 1], table[:, 2:])


def brier_scores(result: BrierResult) -> dict[str, Any]:
    """BrierLM, its standard error and Brier-1 to Brier-4, from 0 to 100, with the names used in results."""
    return {
        "brier_lm": result.brier_lm,
        "error": result.brier_lm_error,
        "brier": [100 * mean for mean in result.means[:4]],
    }


def error_of_mean(values: Sequence[float]) -> float:
    """Standard error of the mean of some values; 0 for a single value, which has no spread."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def error_over_seeds(scores: Sequence[float], errors: Sequence[float]) -> float:
    """Standard error of a score's mean over seeds. Seeds share the text, so its error does not average out.

    Args:
        scores: Score of each seed.
        errors: Standard error of each score over the documents of the text.
    """
    return max(error_of_mean(scores), statistics.mean(errors))


def in_turns(
    functions: Mapping[Name, Callable[[], Any]], rounds: int = 7, warm_up: int = 1, until: float = math.inf
) -> dict[Name, list[float]]:
    """Seconds of each call of each function; the functions are called in turns, after warm-up rounds.

    Machines are noisy, so whatever is compared has to run interleaved in one process.

    Args:
        functions: The functions to time, by name.
        rounds: Timed rounds.
        warm_up: Untimed rounds before them.
        until: No round starts after this time of `time.perf_counter`, except for the first timed round.
    """
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for index in range(warm_up + rounds):
        if index > warm_up and time.perf_counter() > until:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if index >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(
    times: Mapping[Name, list[float]], reference: Name
) -> dict[Name, tuple[float, float, float, float]]:
    """How much faster each function is than a reference, round by round.

    Returns:
        For each name: median seconds; and the median, smallest and largest ratio of the reference's seconds
        to the function's.
    """
    rows = {}
    for name, seconds in times.items():
        by_round = [baseline / measured for measured, baseline in zip(seconds, times[reference], strict=True)]
        rows[name] = statistics.median(seconds), statistics.median(by_round), min(by_round), max(by_round)
    return rows


def peak_memory(function: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Peak memory of a function in bytes, measured in a new process.

    Args:
        function: A module-level function. It is called with the arguments and returns a function, which is
            called without arguments; only the memory of the second call is counted.
        *arguments: Values that can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(queue, function, arguments))
    process.start()
    while queue.empty() and process.is_alive():
        process.join(0.2)
    if queue.empty():
        raise RuntimeError(f"{function.__name__}{arguments} ended with exit code {process.exitcode}.")
    result: int = queue.get()
    process.join()
    return result


def _measure(queue: Any, function: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> None:
    run = function(*arguments)
    reset_peak()
    before = peak()
    run()
    queue.put(max(0, peak() - before))


def reset_peak() -> None:
    """Start a new measurement of peak memory."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux.


def peak() -> int:
    """Most bytes in use since `reset_peak`: allocated on the GPU, or of this process if there is no GPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else status("VmHWM")


def free() -> None:
    """Drop compiled code, and return unused memory to the device."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status (Linux)."""
    # Not getrusage: child processes inherit its peak.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine() -> str:
    """The machine and the version of torch, in one line."""
    if DEVICE == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{torch.get_num_threads()} threads of {model}, torch {torch.__version__}"
