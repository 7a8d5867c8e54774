"""Is calm correct and fast on this GPU?

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only parity
    python benchmarks/gpu.py --toy

It compares the GPU with the CPU, then times the energy loss, training and generation, all within eight
minutes, and writes tables in Markdown and JSON. A failure is reported in them and does not stop the rest; the
exit code is then 1. Whatever does not fit in the time is shortened or skipped, and marked so. With --toy,
everything is tiny and no GPU is needed: this shows that the program runs, but its times mean nothing.
"""

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gpu_parity
import gpu_speed
import torch
import transformers
from measure import DEVICE, Cases, Row, free, json_rows, machine

import calm
from calm.errors import reason_of

_PLANNED_SHARE = 0.9  # Of the time; the rest is for cases that take longer than expected.
TOY_PARITY = gpu_parity.Sizes(width=32, layers=2, vocab_size=300, rows=4, chunks=8)


@dataclass(frozen=True)
class Section:
    """A table of the report.

    Args:
        title: Title.
        share: Share of the time that it gets.
        build: Creates its cases.
    """

    title: str
    share: float
    build: Callable[[], Cases]


@dataclass
class Report:
    """Measurements so far.

    Args:
        machine: Facts about the machine.
        tables: Title of a section -> its rows.
    """

    machine: dict[str, str]
    tables: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """What went wrong, one line each."""
        return [
            f"{title}, {row['case']}: {row['problem']}"
            for title, rows in self.tables.items()
            for row in rows
            if row.get("problem")
        ]

    def markdown(self) -> str:
        """The report in Markdown."""
        facts = [f"- {name}: {value}" for name, value in self.machine.items()]
        verdict = [f"- {problem}" for problem in self.problems] or ["Nothing failed."]
        parts = ["# One GPU", "\n".join(facts), "## What failed", "\n".join(verdict)]
        for title, rows in self.tables.items():
            parts += [f"## {title}", _table(rows)]
        return "\n\n".join(parts) + "\n"

    def write(self, files: Path) -> None:
        """Write both files; `files` is their common path without a suffix."""
        files.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
        result = {"machine": self.machine, "tables": self.tables, "problems": self.problems}
        strict = json.loads(json.dumps(result), parse_constant=str)  # JSON has no NaN.
        files.with_suffix(".json").write_text(json_rows(strict) + "\n", encoding="utf-8")


def run(section: Section, until: float) -> list[Row]:
    """Run the cases of a section; a case that fails becomes a row that says so.

    Args:
        section: The section.
        until: When it should end, as a time of `time.perf_counter`.
    """
    try:
        cases = section.build()
    except Exception as error:
        return [_failed(section.title, error)]
    rows: list[Row] = []
    longest = 0.0
    for index, (name, case) in enumerate(cases.items()):
        start = time.perf_counter()
        if start + longest > until:
            rows.append({"case": name, "note": "left out: no time was left"})
            continue
        try:
            results = case(start + (until - start) / (len(cases) - index))
            rows += [{"case": name, **row} for row in results]
        except Exception as error:  # Whatever it is, the other cases still run.
            rows.append(_failed(name, error))
        free()
        seconds = time.perf_counter() - start
        longest = max(longest, seconds)
        print(f"{section.title}: {name} ({seconds:.0f} s)", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen sections, and return the exit code.

    Args:
        arguments: Command-line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/gpu"), help="folder of the tables")
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="time for all of it")
    parser.add_argument("--only", nargs="+", choices=list(_sections("", True)), help="some sections alone")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a CPU too")
    options = parser.parse_args(arguments)
    if DEVICE == "cpu" and not options.toy:
        return _usage_error(
            "torch finds no GPU here (torch.cuda.is_available() is false); --toy runs without one."
        )
    start = time.perf_counter()
    report = Report(_machine(options.toy))
    files = options.output / time.strftime("gpu_%Y%m%d_%H%M%S")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        report.write(files)
    except OSError as error:
        return _usage_error(f"--output {options.output}: {error.strerror or error}.")
    sections = _sections(_card(), options.toy)
    chosen = [section for name, section in sections.items() if name in (options.only or sections)]
    for index, section in enumerate(chosen):
        now = time.perf_counter()
        remaining = start + _PLANNED_SHARE * 60 * options.minutes - now
        share = section.share / sum(later.share for later in chosen[index:])
        report.tables[section.title] = run(section, now + share * remaining)
        report.write(files)  # After each section, so that nothing is lost if the next one crashes.
    print(f"\n{report.markdown()}\n{files}.md and {files.name}.json, {time.perf_counter() - start:.0f} s")
    return 1 if report.problems else 0


def _sections(card: str, is_toy: bool) -> dict[str, Section]:
    sizes = TOY_PARITY if is_toy else gpu_parity.Sizes()
    rounds: dict[str, Any] = {"rounds": 2} if is_toy else {}
    return {
        "parity": Section("Differences from the CPU", 0.1, partial(gpu_parity.cases, sizes)),
        "energy": Section(
            "The energy loss in float32", 0.05, partial(gpu_speed.energy_cases, is_toy, **rounds)
        ),
        "training": Section(
            "Training in bf16", 0.35, partial(gpu_speed.training_cases, card, is_toy, **rounds)
        ),
        "writing": Section("Writing in bf16", 0.5, partial(gpu_speed.writing_cases, is_toy, **rounds)),
    }


def _machine(is_toy: bool) -> dict[str, str]:
    peak, source = gpu_speed.bf16_peak(_card())
    return {
        "card": _card() or machine(),
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "calm": calm.__version__,
        "peak": f"{peak / 1e12:.4g} TFLOP/s ({source})",
        "sizes": "toys: times mean nothing" if is_toy else "real",
    }


def _card() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else ""


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if DEVICE == "cpu" or program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.split("\n")[0]


def _failed(case: str, error: Exception) -> Row:
    traceback.print_exc()
    return {"case": case, "problem": f"{type(error).__name__}: {reason_of(error)}"}


def _table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("note", "problem")))
    lines = [[*names, "note"]]
    for row in rows:
        note = f"FAILED: {row['problem']}" if row.get("problem") else row.get("note", "")
        lines.append([_format(row.get(name, "")) for name in names] + [note.replace("|", "/")])
    header, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([header, "|---" * (len(names) + 1) + "|", *body])


def _format(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got '{text}'")
    return minutes


def _usage_error(sentence: str) -> int:
    print(f"gpu.py: error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
