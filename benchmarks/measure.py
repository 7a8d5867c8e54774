"""What the benchmarks share: timing in turns, peak memory, what they ran on, and how results are written."""

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
    """A result as JSON that a diff can show: a setting a line, and a row of a table a line.

    Args:
        value: What JSON can hold.
        indent: Spaces before its inner lines.
    """
    inner = " " * (indent + 1)
    if isinstance(value, dict) and value:
        lines = [
            f"{inner}{json.dumps(str(name))}: {json_rows(one, indent + 1)}" for name, one in value.items()
        ]
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"
    if isinstance(value, list) and any(isinstance(row, dict | list) for row in value):
        return "[\n" + ",\n".join(inner + json.dumps(row) for row in value) + "\n" + " " * indent + "]"
    return json.dumps(value)


def rows_of(sums: DocumentSums) -> list[list[float]]:
    """Number, targets and sums of Brier-1 to Brier-4 of every document, for differences between models."""
    columns = sums.document_D.tolist(), sums.count_D.tolist(), sums.total_DX[:, :4].tolist()
    return [
        [number, count, *(round(value, 6) for value in total)]
        for number, count, total in zip(*columns, strict=True)
    ]


def sums_of(rows: list[list[float]]) -> DocumentSums:
    """The same as `rows_of` was given."""
    table = torch.tensor(rows, dtype=torch.float64)
    return DocumentSums(table[:, 0].long(), table[:, 1], table[:, 2:])


def brier_scores(result: BrierResult) -> dict[str, Any]:
    """BrierLM, its standard error and Brier-1 to Brier-4, all of 100, as results keep them."""
    return {
        "brier_lm": result.brier_lm,
        "error": result.brier_lm_error,
        "brier": [100 * mean for mean in result.means[:4]],
    }


def error_of_mean(values: Sequence[float]) -> float:
    """Standard error of the mean of some values; 0 for a single one, which tells nothing of it."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def error_over_seeds(scores: Sequence[float], errors: Sequence[float]) -> float:
    """Standard error of a mean score over seeds, which share the text: its error does not shrink with them.

    Args:
        scores: Of each seed.
        errors: Standard error of each over the documents of the text.
    """
    return max(error_of_mean(scores), statistics.mean(errors))


def in_turns(
    functions: Mapping[Name, Callable[[], Any]], rounds: int = 7, warm_up: int = 1, until: float = math.inf
) -> dict[Name, list[float]]:
    """Seconds of each function, called in turns after some rounds to warm up.

    Machines are noisy: what is compared must run in one process, one after the other.

    Args:
        functions: What is timed.
        rounds: Rounds that are timed.
        warm_up: Rounds before them.
        until: Time of `time.perf_counter` from which on no round begins, but for the first that is timed.
    """
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + rounds):
        if number > warm_up and time.perf_counter() > until:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(
    times: Mapping[Name, list[float]], reference: Name
) -> dict[Name, tuple[float, float, float, float]]:
    """For each function: median seconds, and the median, least and largest ratio to the reference's round."""
    rows = {}
    for name, seconds in times.items():
        by_round = [theirs / own for own, theirs in zip(seconds, times[reference], strict=True)]
        rows[name] = statistics.median(seconds), statistics.median(by_round), min(by_round), max(by_round)
    return rows


def peak_memory(function: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Bytes that a function of this module's importer takes at most, in a process of its own.

    Args:
        function: A function at the top of a module; called as `prepare = function(*arguments)`, and what it
            returns is called without arguments. Memory is counted from between the two.
        *arguments: Plain values.
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
    """Count the peak of memory from here on."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux.


def peak() -> int:
    """Most bytes since `reset_peak`: allocated on the GPU, or of this process where there is none."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else status("VmHWM")


def free() -> None:
    """Let go of what was compiled, and give memory that nobody holds back to the device."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status (Linux)."""
    # Not getrusage: its peak is handed down to child processes.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine() -> str:
    """One line on what this ran on."""
    if DEVICE == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{torch.get_num_threads()} threads of {model}, torch {torch.__version__}"
