"""Ranges of numbers."""

import math
from dataclasses import dataclass

from calm.errors import InputError, shown


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Args:
        low: Lower bound.
        high: Upper bound.
        includes_low: Whether the lower bound is included.
        includes_high: Whether the upper bound is included.
    """

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        below = value <= self.high if self.includes_high else value < self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        lower = f"at least {self.low:,}" if self.includes_low else f"above {self.low:,}"
        if math.isinf(self.high):
            return f"{lower} and finite"
        return f"{lower} and {f'at most {self.high:,}' if self.includes_high else f'below {self.high:,}'}"

    def check(self, name: str, value: float) -> None:
        """Raise ValueError if a value is out of range.

        Args:
            name: What the value is, for the message.
            value: The value.
        """
        if value not in self:
            raise ValueError(f"{name} must be {self}, got {shown(value)}.")

    def require(self, name: str, value: float) -> None:
        """`check` for user input: raises InputError."""
        try:
            self.check(name, value)
        except ValueError as error:
            raise InputError(str(error)) from None


SEEDS = Range(-(2**63), 2**63 - 1)
"""Seeds that all random generators accept."""
BLOCKS = Range(1, 10**9)
"""Numbers of blocks, or of tokens in one."""
ORDERS = Range(1, 64)
"""Orders of n-gram models."""
DRAFT_CHUNKS = Range(1, 64)
"""Numbers of chunks per draft."""
DOCUMENT_MB = Range(1, 10**6)
"""Maximum lengths of a document, in MB."""
SAMPLES = Range(1, 4096)
"""Numbers of texts per prompt."""
NUM_THOUGHTS = Range(0, 10_000)
"""Numbers of continuous thoughts (`calm.models.thoughts`)."""
