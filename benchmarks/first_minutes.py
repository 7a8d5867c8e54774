"""Record what a new user types and sees in the first ten minutes, as a page of the documentation.

    python benchmarks/first_minutes.py --output docs/first_minutes.md

It clones this repository into an empty folder and runs the commands that the page shows. Their output looks
as in a log; long output is cut in the middle, with a mark.
"""

import argparse
import os
import signal
import subprocess
import tempfile
import textwrap
import time
from pathlib import Path

from measure import machine

ROOT = Path(__file__).parents[1]
_INTRODUCTION = """# The first ten minutes

What you type and see as a new user, from a clone to a model of your own, recorded by
`benchmarks/first_minutes.py`. Times are for whole commands. In a terminal, progress bars update in place;
here they look as in a log.

{machine}
"""
# Text before a command, the command, and the seconds after which Ctrl+C stops it, if any.
_STEPS: tuple[tuple[str, str, int | None], ...] = (
    ("Everything goes into `.venv`; most of the time is downloads.", "make install", None),
    (
        "Two small models come with the package, one trained on synthetic stories and one on old books.",
        "calm generate stories 'Once upon a time' --seed 1",
        None,
    ),
    ("The other one:", "calm generate classics 'It was a dark and stormy night' --seed 1", None),
    ("What is each recipe for, and what does it need?", "calm recipes", None),
    (
        "The smallest recipe runs the whole pipeline on the embedded stories.",
        "calm demo --recipe cpu_tiny --output runs/first",
        None,
    ),
    (
        "To train on your own text, name a file or a folder; here, the file that the demo wrote. After a "
        "while, press Ctrl+C.",
        "calm train --recipe laptop_quick --data.sources runs/first-stories.jsonl --output runs/mine "
        "--language_model.training.steps 600 --language_model.training.save_every 100",
        50,
    ),
    ("Training resumes where it stopped.", "calm train --resume --output runs/mine", None),
    (
        "A run's folder is the name of its model.",
        "calm generate runs/mine 'Once there lived a cat' -n 2 --seed 3",
        None,
    ),
    ("The same as JSON, for other programs:", "calm generate runs/mine 'Once' --json --seed 3", None),
)
_MAX_LINES, _COLUMNS = 40, 118


def main() -> None:
    """Record the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/first_minutes.md")
    parser.add_argument("--source", default=str(ROOT), help="repository that is cloned")
    arguments = parser.parse_args()
    # If this runs in the background, it ignores SIGINT, and its commands would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as empty:
        folder = Path(empty) / "calm"
        subprocess.run(["git", "clone", "--quiet", arguments.source, str(folder)], check=True)
        parts, start = [], time.monotonic()
        for text, command, stop_after in _STEPS:
            output, seconds = _run(command, folder, stop_after)
            typed = " \\\n    ".join(textwrap.wrap(command, _COLUMNS - 6, break_on_hyphens=False))
            introduction = textwrap.fill(text, 120)
            parts.append(f"{introduction}\n\n```text\n$ {typed}\n{output}\n```\n\n{_duration(seconds)}")
        total = f"All of it took {round((time.monotonic() - start) / 60)} minutes."
    page = [_INTRODUCTION.format(machine=machine().strip()), *parts, total]
    arguments.output.write_text("\n\n".join(part.strip() for part in page) + "\n", encoding="utf-8")


def _run(command: str, folder: Path, stop_after: int | None) -> tuple[str, float]:
    """The output of a command in the clone's environment, and how many seconds it takes."""
    paths = f"{folder / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": paths, "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=stop_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate()
    return _shorten(output.strip().replace(str(folder), ".")), time.monotonic() - start


def _shorten(output: str) -> str:
    # Pip's warnings are about this machine.
    printed = [line.rstrip() for line in output.splitlines() if not line.startswith("WARNING: ")]
    lines = [
        part for line in printed for part in textwrap.wrap(line, _COLUMNS, drop_whitespace=False) or [""]
    ]
    if len(lines) <= _MAX_LINES:
        return "\n".join(lines)
    num_cut = len(lines) - _MAX_LINES
    return "\n".join([*lines[: _MAX_LINES // 2], f"[... {num_cut} lines ...]", *lines[-_MAX_LINES // 2 :]])


def _duration(seconds: float) -> str:
    return f"({seconds:.0f} s)" if seconds < 120 else f"({seconds / 60:.0f} min)"


if __name__ == "__main__":
    main()
