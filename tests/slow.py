"""The tests that `make test` leaves out."""

from pathlib import Path

SLOW = Path(__file__).with_name("slow.txt")


def slow_tests() -> tuple[str, ...]:
    """The lines of slow.txt, each a prefix of test ids."""
    lines = SLOW.read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))
